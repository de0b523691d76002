//! How fast the server is, as a multiple of what the kernel asks for the same work.
//!
//!     make bench
//!     cargo bench --bench bench -- flood flight        only these parts; `PARTS` has all
//!     cargo bench --bench bench -- ./before ./after    other servers, one after the other: paths, with
//!                                                      a slash in them
//!
//! The *floor* is a bare loop in a process of its own that writes the same bytes to as many
//! loopback sockets. Servers and floor are measured in turn, on the same processor, by the
//! processor time that the kernel counts for them; the load runs on another one. A ratio is the
//! median of `ROUNDS` rounds, each compared with the floor just before. Every delivery is read and
//! counted. The run fails if a count is wrong, but not for any time.

mod person;
#[path = "../suite/process.rs"]
mod process;

use person::Person;
use process::{descriptor_limit, processor_time, Server};
use std::io::{self, Read, Write};
use std::net::TcpListener;
use std::process::Command;
use std::time::{Duration, Instant};
use std::{env, fs, thread};

/// A part of the run, by the word that selects it.
type Part = (&'static str, fn(&str));
const PARTS: [Part; 5] =
    [("rooms", rooms), ("flight", flight), ("flood", flood), ("memory", memory), ("storm", storm)];
const ROUNDS: usize = 7;
const TEXT: &str = "sixty-four characters, which is about what somebody says at once";
/// The floor is this program; a variable says how many connections it gets.
const FLOOR: &str = "/proc/self/exe";
const FLOOR_SIZE: &str = "LINECHAT_FLOOR_SIZE";

/// Puts a process on one processor. If the machine has only one, all processes share it.
fn pin(process: u32, processor: &str) {
    let mut taskset = Command::new("taskset");
    taskset.args(["-apc", processor, &process.to_string()]);
    taskset.output().expect("taskset(1), of Debian's util-linux");
}

/// Clients with nothing unread between two steps and with non-blocking sockets, and the process that
/// they are connected to: a server, or the floor in its place.
struct Crowd {
    process: Server,
    people: Vec<Person>,
    buffer: Vec<u8>,
}

impl Crowd {
    /// Starts a program, and has `count` clients join.
    fn gather(program: &str, count: usize) -> Crowd {
        let process = Server::start_as(Command::new(program).env(FLOOR_SIZE, count.to_string()));
        let process = process.expect("it starts");
        let mut crowd = Crowd { process, people: Vec::new(), buffer: vec![0; 1 << 18] };
        pin(crowd.process.child.id(), "1");
        crowd.join(count);
        if program != FLOOR {
            crowd.fence();
        }
        crowd
    }

    fn join(&mut self, count: usize) {
        for at in self.people.len()..self.people.len() + count {
            let mut person = Person::connect(&self.process.address);
            person.socket().set_nonblocking(true).expect("does not block");
            person.say(&format!("NAME p{at:05}"));
            self.people.push(person);
        }
    }

    /// Every client reads all that it was sent.
    fn fence(&mut self) {
        // By the second round all requests have been carried out, so nothing comes after its PONG.
        for _ in 0..2 {
            for person in &mut self.people {
                person.socket().set_nonblocking(false).expect("blocks");
                person.fence();
                person.socket().set_nonblocking(true).expect("does not block");
            }
        }
    }

    /// Microseconds of processor time that all threads of the process have used.
    fn used(&self) -> f64 {
        let threads = fs::read_dir(format!("/proc/{}/task", self.process.child.id()));
        let names = threads.into_iter().flatten().flatten().map(|thread| thread.file_name());
        let numbers = names.filter_map(|name| name.to_str()?.parse().ok());
        numbers.map(processor_time).sum::<Duration>().as_secs_f64() * 1e6
    }

    /// Microseconds of the process's time for one operation, of which a round has `count`. The methods
    /// below return the same.
    fn cost(&mut self, rounds: usize, count: usize, mut round: impl FnMut(&mut Crowd)) -> f64 {
        let before = self.used();
        (0..rounds).for_each(|_| round(self));
        (self.used() - before) / (rounds * count) as f64
    }

    /// Reads what has arrived. `missing` is how many lines each client has still to receive. Returns
    /// true while a client misses some.
    fn read(&mut self, missing: &mut [usize]) -> bool {
        for (person, missing) in self.people.iter_mut().zip(&mut *missing) {
            while let Ok(length @ 1..) = person.socket().read(&mut self.buffer) {
                let lines = self.buffer[..length].iter().filter(|&&byte| byte == b'\n').count();
                *missing = missing.checked_sub(lines).expect("each line once");
            }
        }
        missing.iter().any(|&lines| lines > 0)
    }

    /// The floor writes `lines` lines at once to every client.
    fn write(&mut self, rounds: usize, lines: usize) -> f64 {
        let people = self.people.len();
        self.cost(rounds, lines * people, |floor| {
            floor.people[0].say(&format!("{lines:7}"));
            let mut missing = vec![lines; people];
            while floor.read(&mut missing) {}
        })
    }

    /// Each of the first `senders` clients sends `messages` messages. It keeps `window` of them in
    /// flight: sent, and not yet received by every other client.
    fn talk(&mut self, senders: usize, messages: usize, window: usize) -> f64 {
        let people = self.people.len();
        self.cost(1, senders * messages * (people - 1), |crowd| {
            let others = |at| senders - usize::from(at < senders);
            let mut missing: Vec<_> = (0..people).map(|at| others(at) * messages).collect();
            let (mut sent, mut received) = (0, 0);
            while received < messages {
                let count = messages.min(received + window) - sent;
                sent += count;
                let lines = format!("MSG {TEXT}\n").repeat(count);
                for sender in &mut crowd.people[..senders] {
                    sender.socket().write_all(lines.as_bytes()).expect("a few are taken");
                }
                crowd.read(&mut missing);
                let of_each = |at: usize| missing[at].div_ceil(others(at).max(1));
                received = messages - (0..people).map(of_each).max().unwrap_or(0);
            }
        })
    }

    /// In twenty pairs, one sends the other a private message, which is confirmed.
    fn whisper(&mut self, rounds: usize) -> f64 {
        self.cost(rounds, 20, |crowd| {
            let request = |to| format!("PRIV @p{to:05} {TEXT}");
            (0..40).step_by(2).for_each(|at| crowd.people[at].say(&request(at + 1)));
            let mut missing = [1; 40];
            while crowd.read(&mut missing) {}
        })
    }

    /// A client joins and leaves, and every client passes two fences.
    fn come_and_go(&mut self, rounds: usize) -> f64 {
        self.cost(rounds, 1, |crowd| {
            crowd.join(1);
            let mut last = crowd.people.pop().expect("a client has joined");
            last.socket().set_nonblocking(false).expect("blocks");
            last.leave();
            crowd.fence();
        })
    }
}

/// The bare loop: accepts `count` connections. The first client then says how many lines to write to
/// each. The loop prints where it listens, as the server does.
fn floor(count: usize) -> io::Result<()> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    println!("2000-01-01T00:00:00Z listening on {}", listener.local_addr()?);
    let mut sockets = listener.incoming().take(count).collect::<io::Result<Vec<_>>>()?;
    for socket in &mut sockets {
        socket.set_nodelay(true)?;
        socket.read_exact(&mut [0; "NAME p00000\n".len()])?;
    }
    let mut lines = [0; 8];
    while sockets[0].read_exact(&mut lines).is_ok() {
        let lines = String::from_utf8_lossy(&lines).trim().parse().unwrap_or(0);
        let bytes = format!("MSG p00000 {TEXT}\r\n").repeat(lines);
        sockets.iter_mut().try_for_each(|socket| socket.write_all(bytes.as_bytes()))?;
    }
    Ok(())
}

fn print(what: &str, ratio: f64, of: &str, figures: &str) {
    println!("| {what} | {ratio:.2} × {of} | {figures} |");
}

/// The least, the median, and the greatest.
fn spread(values: impl IntoIterator<Item = f64>) -> [f64; 3] {
    let mut values: Vec<_> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    [values[0], values[values.len() / 2], values[values.len() - 1]]
}

/// A floor and a server, with as many clients each.
type Pair = [Crowd; 2];

/// Returns a cost that `Crowd::cost` has measured.
type Cost<'a> = &'a dyn Fn(&mut Crowd) -> f64;

fn gather_pair(program: &str, people: usize) -> Pair {
    // The floor gets as many clients as the limit on open files leaves for it.
    let left = descriptor_limit().saturating_sub(people);
    [Crowd::gather(FLOOR, people.min(left)), Crowd::gather(program, people)]
}

/// Measures both in turn.
fn compare([floor, server]: &mut Pair, what: &str, of: &str, floor_cost: Cost, cost: Cost) {
    let costs: Vec<_> = (0..ROUNDS).map(|_| (floor_cost(floor), cost(server))).collect();
    let [_, ratio, _] = spread(costs.iter().map(|(floor, cost)| cost / floor));
    let [least, cost, most] = spread(costs.iter().map(|(_, cost)| *cost));
    let rate = 1e6 / cost;
    let figures = format!("{cost:.3} µs ({least:.3} to {most:.3}), {rate:.0} a second");
    print(what, ratio, of, &figures);
}

/// Ten clients keep `window` messages in flight each.
fn compare_in_flight(pair: &mut Pair, window: usize) {
    let people = pair[1].people.len();
    let senders = 10.min(people - 1);
    let what = format!("a delivery in a room of {people}, {senders} × {window} in flight");
    let floor_cost: Cost = &|floor| floor.write(4, senders * window);
    let cost: Cost = &|server| server.talk(senders, 4 * window + 60, window);
    compare(pair, &what, "the floor's batches", floor_cost, cost);
}

/// Messages, private messages, joins and leaves in rooms of several sizes.
fn rooms(program: &str) {
    for people in [10, 100, 1000, 10_000] {
        let pair = &mut gather_pair(program, people);
        let (few, many) = ((60_000 / people).clamp(6, 200), (8000 / people).clamp(1, 60));
        let write: Cost = &|floor| floor.write(few, 1);
        let write_to_each: Cost = &|floor| write(floor) * people as f64;
        let one = format!("a delivery in a room of {people}, one message at a time");
        let ten = format!("a delivery in a room of {people}, 10 messages at a time");
        compare(pair, &one, "a floor write", write, &|server| server.talk(1, few, 1));
        compare(pair, &ten, "a floor write", write, &|server| server.talk(10, many, 1));
        compare_in_flight(pair, 128);
        if [100, 1000].contains(&people) {
            let private = format!("private message with confirmation, room of {people}");
            let join = format!("join and leave, room of {people}, and two PINGs from each");
            let count = (10_000 / people).min(20);
            compare(pair, &private, "a floor write", write, &|server| server.whisper(100));
            compare(pair, &join, "a write to each", write_to_each, &|it| it.come_and_go(count));
        }
    }
}

/// The more messages are in flight, the less a delivery costs; a row that costs more than the one
/// before it is a cliff.
fn flight(program: &str) {
    let pair = &mut gather_pair(program, 1000);
    [1, 8, 32, 64, 128, 256].into_iter().for_each(|window| compare_in_flight(pair, window));
}

/// Until `end`, the first `flooders` clients send these lines without pause, and the first `readers`
/// read.
fn rush(crowd: &mut Crowd, flooders: usize, readers: usize, lines: &str, end: Instant) {
    let (lines, mut buffer) = (lines.repeat(10_000), vec![0; 1 << 16]);
    while Instant::now() < end {
        for (at, person) in crowd.people[..readers].iter_mut().enumerate() {
            if at < flooders {
                // Where this is cut, the next line is an unknown command.
                let _ = person.socket().write(lines.as_bytes());
            }
            while matches!(person.socket().read(&mut buffer), Ok(1..)) {}
        }
    }
}

/// How many milliseconds each PING of the last client takes during a flood.
fn pings(program: &str, people: usize, flooders: usize, lines: &str) -> Vec<f64> {
    let mut crowd = Crowd::gather(program, people);
    let mut bystander = crowd.people.pop().expect("a client");
    bystander.socket().set_nonblocking(false).expect("blocks");
    let (mut times, end) = (Vec::new(), Instant::now() + Duration::from_secs(3));
    thread::scope(|scope| {
        // A second longer, so that the bystander always has something to read.
        let flood_end = end + Duration::from_secs(1);
        scope.spawn(move || rush(&mut crowd, flooders, people - 1, lines, flood_end));
        while Instant::now() < end {
            let begun = Instant::now();
            bystander.say("PING 1");
            bystander.until("PONG 1");
            times.push(begun.elapsed().as_secs_f64() * 1e3);
            let begun = Instant::now();
            while begun.elapsed() < Duration::from_millis(10) {
                bystander.line();
            }
        }
    });
    times
}

/// PINGs of a bystander while others flood the room.
fn flood(program: &str) {
    let (say, say_and_ask) = ("MSG x\n", "MSG x\nLIST\n");
    let floods = [(100, 20, say), (1000, 1, say), (1000, 100, say), (3000, 20, say_and_ask)];
    for (people, flooders, lines) in floods {
        let write = Crowd::gather(FLOOR, people).write(50_000 / people, 1) * people as f64 / 1e3;
        let times = (0..3).flat_map(|_| pings(program, people, flooders, lines));
        let [_, middle, worst] = spread(times);
        let what =
            format!("PING of a bystander, {flooders} of {people} send {lines:?} without pause");
        let figures = format!("{middle:.2} ms, at worst {worst:.2}");
        print(&what, middle / write, "a write to each", &figures);
    }
}

/// Three clients talk without pause for twenty seconds, and 500 read nothing.
fn memory(program: &str) {
    let mut crowd = Crowd::gather(program, 503);
    let before = crowd.process.memory("VmRSS:");
    rush(&mut crowd, 3, 3, &format!("MSG {TEXT}\n"), Instant::now() + Duration::from_secs(20));
    let [peak, now] = [crowd.process.memory("VmHWM:"), crowd.process.memory("VmRSS:")]
        .map(|bytes| bytes.saturating_sub(before) as f64 / 1024.0);
    let each = now / 500.0;
    let what = "memory beside 500 clients that read nothing while 3 talk for 20 s";
    let figures = format!("peak {peak:.0} KiB; at the end {now:.0} KiB, {each:.1} each");
    print(what, peak / 4096.0, "4 MiB", &figures);
}

/// Ten thousand clients connect at once, do nothing, and disconnect at once.
fn storm(program: &str) {
    let (people, of) = (10_000, "a floor write for each");
    let write = Crowd::gather(FLOOR, 1000).write(60, 1);
    let mut crowd = Crowd::gather(program, 0);
    let empty = crowd.process.memory("VmRSS:");
    let cost = crowd.cost(1, people, |crowd| {
        crowd.join(people);
        crowd.fence();
    });
    print("10000 join at once", cost / write, of, &format!("{cost:.1} µs each"));
    // The lines of the console that are not read would count as well.
    while let Ok(Some(_)) = crowd.process.next_line_within(Duration::from_secs(1)) {}
    let each = crowd.process.memory("VmRSS:").saturating_sub(empty) / people;
    let idle = crowd.cost(1, 1000, |_| thread::sleep(Duration::from_secs(5)));
    let what = "10000 idle clients, after they have joined at once";
    let figures = format!("{each} bytes each; {idle:.1} ms of processor in 5 s");
    print(what, each as f64 / 400.0, "400 bytes each", &figures);
    let mut last = crowd.people.pop().expect("a client");
    last.socket().set_nonblocking(false).expect("blocks");
    let cost = crowd.cost(1, people, |crowd| {
        crowd.people.clear();
        while !last.line().ends_with(" 1 disconnected") {}
    });
    let what = "all but one of 10000 disconnect at once";
    print(what, cost / write, of, &format!("{cost:.1} µs each"));
}

fn main() {
    if let Ok(size) = env::var(FLOOR_SIZE) {
        return floor(size.parse().expect("a number")).expect("a network");
    }
    assert!(descriptor_limit() > 12_000, "raise the limit on open files to 12 300 (ulimit -n)");
    pin(std::process::id(), "0");
    let words = env::args().skip(1).filter(|word| word != "--bench");
    let (mut servers, only): (Vec<_>, Vec<_>) = words.partition(|word| word.contains('/'));
    if servers.is_empty() {
        servers.push(env!("CARGO_BIN_EXE_linechat-server").to_owned());
    }
    for server in servers {
        println!("{server}\n\n| what | ratio | figures |\n|---|---|---|");
        let is_wanted = |part: &str| only.is_empty() || only.iter().any(|word| word == part);
        PARTS.into_iter().filter(|(part, _)| is_wanted(part)).for_each(|it| it.1(&server));
        println!();
    }
}
