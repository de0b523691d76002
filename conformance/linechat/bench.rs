//! How fast the server is, as a multiple of what the kernel asks for the same work.
//!
//!     make bench
//!     cargo bench --bench bench -- flood flight        only these parts; `PARTS` has all
//!     cargo bench --bench bench -- ./before ./after    other servers: paths, with a slash in them
//!
//! The *floor* is a bare loop in a process of its own that writes the same bytes to as many
//! loopback sockets. Servers and floor are measured in turn, on the same processor, by the
//! processor time that the kernel counts for them; the load runs on another one. A ratio is the
//! median of those in `ROUNDS` rounds, each to the floor just before. Every delivery is read and
//! counted; a wrong count makes the run fail. No time does.

mod person;
#[path = "../suite/process.rs"]
mod process;

use person::Person;
use process::{descriptor_limit, processor_time, Server};
use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::net::TcpListener;
use std::process::Command;
use std::time::{Duration, Instant};
use std::{env, fs, iter, thread};

const PARTS: [&str; 6] = ["rooms", "flight", "latency", "flood", "memory", "storm"];
const ROUNDS: usize = 7;
const TEXT: &str = "sixty-four characters, which is about what somebody says at once";
/// The floor is this program, told in a variable how many connections it gets.
const FLOOR: &str = "/proc/self/exe";
const FLOOR_SIZE: &str = "LINECHAT_FLOOR_SIZE";

/// Puts a process on one processor. Where there is only one, all share it.
fn pin(process: u32, processor: &str) {
    let mut taskset = Command::new("taskset");
    taskset.args(["-apc", processor, &process.to_string()]);
    taskset.output().expect("taskset(1), of Debian's util-linux");
}

/// The next line; `None` at the end of the stream. It polls without pause, because on a virtual
/// machine waking up takes longer than what is measured.
fn line(person: &mut Person) -> Option<String> {
    loop {
        match person.next() {
            Err(error) if error.kind() == ErrorKind::WouldBlock => thread::yield_now(),
            result => return result.ok()?,
        }
    }
}

/// Reads up to a line that ends with `end`. Returns true if one came before the end of the stream.
fn until(person: &mut Person, end: &str) -> bool {
    iter::from_fn(|| line(person)).any(|line| line.ends_with(end))
}

/// Clients with nothing unread between two steps, and the process that they are connected to: a
/// server, or the floor in its place.
struct Crowd {
    process: Server,
    people: Vec<Person>,
}

impl Crowd {
    /// Starts a program, and has `count` clients join.
    fn gather(program: &str, count: usize) -> Crowd {
        let process = Server::start_as(Command::new(program).env(FLOOR_SIZE, count.to_string()));
        let mut crowd = Crowd { process: process.expect("it starts"), people: Vec::new() };
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

    /// Everybody reads all that they were sent.
    fn fence(&mut self) {
        // By the second round all requests have been carried out, so nothing comes after its PONG.
        for round in ["1", "2"] {
            for person in &mut self.people {
                person.say(&format!("PING {round}"));
                assert!(until(person, &format!("PONG {round}")), "a connection has ended");
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

    /// Microseconds of the process's time for one of something, of which a round does `count`. The
    /// functions below return the same.
    fn cost(&mut self, rounds: usize, count: usize, mut round: impl FnMut(&mut Crowd)) -> f64 {
        let before = self.used();
        (0..rounds).for_each(|_| round(self));
        (self.used() - before) / (rounds * count) as f64
    }

    /// Client `at` receives `messages(at)` messages.
    fn hear(&mut self, messages: impl Fn(usize) -> usize) {
        for (at, person) in self.people.iter_mut().enumerate() {
            for _ in 0..messages(at) {
                assert!(line(person).is_some_and(|it| it.ends_with(TEXT)), "not what was said");
            }
        }
    }

    /// The floor writes `lines` lines at once to everybody.
    fn write(&mut self, rounds: usize, lines: usize) -> f64 {
        self.cost(rounds, lines * self.people.len(), |floor| {
            floor.people[0].say(&format!("{lines:7}"));
            floor.hear(|_| lines);
        })
    }

    /// The senders send one message each, at once.
    fn speak(&mut self, rounds: usize, senders: usize) -> f64 {
        self.cost(rounds, senders * (self.people.len() - 1), |crowd| {
            let line = format!("MSG {TEXT}");
            crowd.people[..senders].iter_mut().for_each(|sender| sender.say(&line));
            crowd.hear(|at| senders - usize::from(at < senders));
        })
    }

    /// Ten senders send `4 * window + 60` messages each and keep `window` of them in flight: a further
    /// message follows when the last client, which sends nothing, has received one.
    fn fly(&mut self, window: usize) -> f64 {
        let (senders, total) = (10, 4 * window + 60);
        self.cost(1, senders * total * (self.people.len() - 1), |crowd| {
            let line = format!("MSG {TEXT}\n");
            let (mut sent, mut may_send) = (vec![0; senders], vec![window; senders]);
            let (mut buffer, last) = (vec![0; 1 << 18], crowd.people.len() - 1);
            let missing = |at| (senders - usize::from(at < senders)) * total;
            let mut missing: Vec<_> = (0..=last).map(missing).collect();
            while missing.iter().any(|&lines| lines > 0) {
                for (at, sender) in crowd.people[..senders].iter_mut().enumerate() {
                    let count = may_send[at].min(total - sent[at]);
                    sender.socket().write_all(line.repeat(count).as_bytes()).expect("is taken");
                    sent[at] += count;
                    may_send[at] = 0;
                }
                for (at, person) in crowd.people[..last].iter_mut().enumerate() {
                    while let Ok(length @ 1..) = person.socket().read(&mut buffer) {
                        let ends = buffer[..length].iter().filter(|&&byte| byte == b'\n');
                        missing[at] = missing[at].checked_sub(ends.count()).expect("no more");
                    }
                }
                while let Ok(line) = crowd.people[last].next() {
                    let from = line.as_ref().and_then(|line| line.get(4..10)?.strip_prefix('p'));
                    let from = from.and_then(|digits| digits.parse().ok()).unwrap_or(senders);
                    *may_send.get_mut(from).expect("a message from a sender") += 1;
                    missing[last] -= 1;
                }
            }
        })
    }

    /// In twenty pairs, one sends the other a private message, which is confirmed.
    fn whisper(&mut self, rounds: usize) -> f64 {
        self.cost(rounds, 20, |crowd| {
            let request = |to| format!("PRIV @p{to:05} {TEXT}");
            (0..40).step_by(2).for_each(|at| crowd.people[at].say(&request(at + 1)));
            crowd.hear(|at| usize::from(at < 40));
        })
    }

    /// A client joins and leaves, and everybody passes two fences.
    fn come_and_go(&mut self, rounds: usize) -> f64 {
        self.cost(rounds, 1, |crowd| {
            crowd.join(1);
            let mut last = crowd.people.pop().expect("a client has joined");
            last.say("QUIT");
            iter::from_fn(|| line(&mut last)).for_each(drop);
            crowd.fence();
        })
    }
}

/// The bare loop: accepts `count` connections; then the first of them tells how many lines to write
/// to each. It shows where it listens as the server does.
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

/// What is measured of a server: its ratio to the floor, and the figures behind it.
type Measured = (f64, String);

/// Prints a row for each server, the others with what they are of the first.
fn print(what: &str, of: &str, servers: &[Measured]) {
    for (at, (ratio, figures)) in servers.iter().enumerate() {
        let change = match at {
            0 => String::new(),
            _ => format!("server {}: {:.2} × server 1; ", at + 1, ratio / servers[0].0),
        };
        println!("| {what} | {ratio:.2} × {of} | {change}{figures} |");
    }
}

/// The least, the median, and the greatest.
fn spread(mut values: Vec<f64>) -> [f64; 3] {
    values.sort_by(f64::total_cmp);
    [values[0], values[values.len() / 2], values[values.len() - 1]]
}

/// Microseconds that something takes, as `Crowd` measures it.
type Measure<'a> = &'a dyn Fn(&mut Crowd) -> f64;

/// The floor, and after it the servers to be measured, with as many clients each.
fn gather(servers: &[String], people: usize) -> Vec<Crowd> {
    // The floor makes do with what the limit on open files leaves for it.
    let left = descriptor_limit().saturating_sub(people * servers.len());
    let floor = Crowd::gather(FLOOR, people.min(left));
    iter::once(floor).chain(servers.iter().map(|it| Crowd::gather(it, people))).collect()
}

/// Measures the floor and the servers in turn.
fn compare(what: &str, of: &str, crowds: &mut [Crowd], below: Measure, above: Measure) {
    let mut all = vec![(Vec::new(), Vec::new()); crowds.len() - 1];
    for _ in 0..ROUNDS {
        let floor = below(&mut crowds[0]);
        for (crowd, (ratios, costs)) in crowds[1..].iter_mut().zip(&mut all) {
            let cost = above(crowd);
            ratios.push(cost / floor);
            costs.push(cost);
        }
    }
    let measured = |(ratios, costs)| {
        let [least, cost, most] = spread(costs);
        let rate = 1.0 / cost;
        let figures = format!("{cost:.3} µs ({least:.3} to {most:.3}), {rate:.2} M/s");
        (spread(ratios)[1], figures)
    };
    print(what, of, &all.into_iter().map(measured).collect::<Vec<_>>());
}

/// Messages, private messages, joins and leaves in a room of `people`.
fn room(servers: &[String], people: usize) {
    let rooms = &mut gather(servers, people);
    let (few, many) = ((60_000 / people).clamp(6, 200), (8000 / people).clamp(1, 60));
    for (what, rounds, senders) in [("one message", few, 1), ("10 messages", many, 10)] {
        let what = format!("a delivery in a room of {people}, {what} at a time");
        let (write, speak): (Measure, Measure) =
            (&|floor| floor.write(rounds, 1), &|crowd| crowd.speak(rounds, senders));
        compare(&what, "a floor write", rooms, write, speak);
    }
    if people < 40 {
        return flight(rooms, 128);
    }
    let what = format!("private message with confirmation, room of {people}");
    let write: Measure = &|floor| floor.write(few, 1);
    compare(&what, "a floor write", rooms, write, &|crowd| crowd.whisper(100));
    let what = format!("join and leave, room of {people}, and two PINGs from each");
    let (each, rounds) = (people as f64, (10_000 / people).clamp(1, 20));
    let join: Measure = &|crowd| crowd.come_and_go(rounds);
    compare(&what, "a write to each", rooms, &|floor| write(floor) * each, join);
    flight(rooms, 128);
}

/// Messages of ten senders that keep `window` in flight each. Without a cliff, a delivery costs less
/// the more there are.
fn flight(rooms: &mut [Crowd], window: usize) {
    let people = rooms[1].people.len();
    let what = format!("a delivery in a room of {people}, 10 × {window} messages in flight");
    let (write, fly): (Measure, Measure) =
        (&|floor| floor.write(4, 10 * window), &|crowd| crowd.fly(window));
    compare(&what, "the floor's batches", rooms, write, fly);
}

/// Time from sending to what the last has received.
fn latency(servers: &[String]) {
    let time = |work: fn(&mut Crowd) -> f64| {
        move |crowd: &mut Crowd| {
            thread::sleep(Duration::from_millis(50)); // otherwise it would be a flood
            let begun = Instant::now();
            work(crowd);
            begun.elapsed().as_secs_f64() * 1e6
        }
    };
    let what = "latency to the last of 1000, 10 messages a second";
    let (write, speak) = (time(|floor| floor.write(1, 1)), time(|crowd| crowd.speak(1, 1)));
    compare(what, "the floor", &mut gather(servers, 1000), &write, &speak);
}

/// The first `flooders` clients send these lines without pause, and everybody reads, until `end`.
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

/// How many milliseconds each PING takes beside a flood. Infinitely many if its sender is removed.
fn flood(server: &str, people: usize, flooders: usize, lines: &str) -> Vec<f64> {
    let mut crowd = Crowd::gather(server, people);
    let mut bystander = crowd.people.pop().expect("somebody").voice();
    bystander.set_nonblocking(false).expect("blocks");
    let mut heard = BufReader::new(bystander.try_clone().expect("a handle")).split(b'\n');
    let (mut times, end) = (Vec::new(), Instant::now() + Duration::from_secs(3));
    thread::scope(|scope| {
        // For a second more, so that there is always something to be heard.
        let flood_end = end + Duration::from_secs(1);
        scope.spawn(move || rush(&mut crowd, flooders, people - 1, lines, flood_end));
        while Instant::now() < end {
            let begun = Instant::now();
            let _ = bystander.write_all(b"PING 1\n");
            let has_come = heard.any(|line| line.is_ok_and(|line| line == b"PONG 1\r"));
            times.push(if has_come { begun.elapsed().as_secs_f64() * 1e3 } else { f64::INFINITY });
            let begun = Instant::now();
            heard.find(|_| begun.elapsed() > Duration::from_millis(10));
        }
    });
    times
}

fn floods(servers: &[String]) {
    for (people, flooders) in [(100, 20), (1000, 1), (1000, 100), (3000, 20)] {
        // In the largest room they ask for the roster, too.
        let lines = if people == 3000 { "MSG x\nLIST\n" } else { "MSG x\n" };
        let write = Crowd::gather(FLOOR, people).write(50_000 / people, 1) * people as f64 / 1e3;
        let mut times = vec![Vec::new(); servers.len()];
        for _ in 0..3 {
            for (server, times) in servers.iter().zip(&mut times) {
                times.extend(flood(server, people, flooders, lines));
            }
        }
        let measured = |times| {
            let [_, middle, worst] = spread(times);
            (middle / write, format!("{middle:.2} ms, at worst {worst:.2}"))
        };
        let what =
            format!("PING of a bystander, {flooders} of {people} send {lines:?} without pause");
        print(&what, "a write to each", &times.into_iter().map(measured).collect::<Vec<_>>());
    }
}

/// Three talk without pause for twenty seconds, and 500 read nothing.
fn memory(servers: &[String]) {
    let measured = |server: &String| {
        let mut crowd = Crowd::gather(server, 503);
        let before = crowd.process.memory();
        rush(&mut crowd, 3, 3, &format!("MSG {TEXT}\n"), Instant::now() + Duration::from_secs(20));
        let [peak, now] = [crowd.process.peak_memory(), crowd.process.memory()]
            .map(|bytes| bytes.saturating_sub(before) as f64 / 1024.0);
        let each = now / 500.0;
        (peak / 4096.0, format!("peak {peak:.0} KiB; at the end {now:.0} KiB, {each:.1} each"))
    };
    let what = "memory beside 500 who read nothing while 3 talk for 20 s";
    print(what, "4 MiB", &servers.iter().map(measured).collect::<Vec<_>>());
}

/// Ten thousand clients connect at once, do nothing, and disconnect at once.
fn storm(servers: &[String]) {
    let people = 10_000;
    let mut results = [Vec::new(), Vec::new(), Vec::new()];
    for server in servers {
        let write = Crowd::gather(FLOOR, 1000).write(60, 1);
        let mut crowd = Crowd::gather(server, 0);
        let empty = crowd.process.memory();
        let coming = crowd.cost(1, people, |crowd| {
            crowd.join(people);
            crowd.fence();
        });
        results[0].push((coming / write, format!("{coming:.1} µs each")));
        // What is unread of the console would count as well.
        while let Ok(Some(_)) = crowd.process.next_line_within(Duration::from_secs(1)) {}
        let each = crowd.process.memory().saturating_sub(empty) / people;
        let idle = crowd.cost(1, 1000, |_| thread::sleep(Duration::from_secs(5)));
        let figures = format!("{each} bytes each; {idle:.1} ms of processor in 5 s");
        results[1].push((each as f64 / 400.0, figures));
        let mut last = crowd.people.pop().expect("somebody");
        let going = crowd.cost(1, people, |crowd| {
            crowd.people.clear();
            assert!(until(&mut last, " 1 disconnected"), "the last is told of everybody");
        });
        results[2].push((going / write, format!("{going:.1} µs each")));
    }
    print("10000 join at once", "a floor write for each", &results[0]);
    print("10000 who do nothing", "400 bytes each", &results[1]);
    print("all but one of 10000 disconnect at once", "a floor write for each", &results[2]);
}

fn main() {
    if let Ok(size) = env::var(FLOOR_SIZE) {
        return floor(size.parse().expect("a number")).expect("a network");
    }
    let limit = descriptor_limit();
    assert!(limit > 12_000, "12 300 open files are needed; raise the limit with ulimit -n");
    pin(std::process::id(), "0");
    let words = env::args().skip(1).filter(|word| word != "--bench");
    let (mut servers, only): (Vec<_>, Vec<_>) = words.partition(|word| word.contains('/'));
    if servers.is_empty() {
        servers.push(env!("CARGO_BIN_EXE_linechat-server").to_owned());
    }
    if let Some(word) = only.iter().find(|word| !PARTS.contains(&word.as_str())) {
        panic!("there is no part '{word}'; the parts are {}", PARTS.join(", "));
    }
    let is_asked = |part| only.is_empty() || only.iter().any(|word| word == part);
    for (at, server) in servers.iter().enumerate() {
        println!("server {}: {server}", at + 1);
    }
    println!("\n| what | ratio | figures |\n|---|---|---|");
    for people in [10, 100, 1000, 10_000].into_iter().filter(|_| is_asked("rooms")) {
        room(&servers, people.min((limit - 2000) / servers.len()));
    }
    if is_asked("flight") {
        let rooms = &mut gather(&servers, 1000);
        [1, 8, 32, 64, 128, 256].into_iter().for_each(|window| flight(rooms, window));
    }
    for (part, run) in [
        ("latency", latency as fn(&[String])),
        ("flood", floods),
        ("memory", memory),
        ("storm", storm),
    ] {
        if is_asked(part) {
            run(&servers);
        }
    }
}
