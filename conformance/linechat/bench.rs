//! How fast the server is, as a multiple of what the kernel asks for the same work.
//!
//!     make bench
//!     cargo bench --bench bench -- latency flood       only these parts: rooms, latency, flood, storm
//!     cargo bench --bench bench -- ./before ./after    other servers, by paths with a slash in them
//!
//! The *floor* is a bare loop in a process of its own that writes the same bytes to as many
//! loopback sockets. Servers and floor are measured in turn, on the same processor, by the
//! processor time that the kernel counts for them; the load runs on another one. A ratio is the
//! median of those in `ROUNDS` rounds, each to the floor just before. Every delivery is counted by
//! its bytes; a wrong count makes the run fail. No time does.

#[path = "../suite/process.rs"]
mod process;

use process::{descriptor_limit, Server};
use std::io::{self, ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use std::{fs, thread};

const ROUNDS: usize = 7;
/// Characters of a message.
const TEXT: usize = 64;

fn name(at: usize) -> String {
    format!("p{at:05}")
}

/// A message as those receive it to whom it is sent.
fn received(verb: &str) -> String {
    format!("{verb} {} {}\r\n", name(0), "x".repeat(TEXT))
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::INFINITY)
}

/// Microseconds of processor time that all threads of a process have used (proc(5), schedstat).
fn used(process: u32) -> f64 {
    let threads = fs::read_dir(format!("/proc/{process}/task")).into_iter().flatten().flatten();
    let files = threads.filter_map(|it| fs::read_to_string(it.path().join("schedstat")).ok());
    files.filter_map(|file| file.split(' ').next()?.parse::<f64>().ok()).sum::<f64>() / 1e3
}

/// Puts a process on one processor. Where there is only one, all share it.
fn pin(process: u32, processor: &str) {
    let mut taskset = Command::new("taskset");
    taskset.args(["-apc", processor, &process.to_string()]);
    taskset.output().expect("taskset(1), of Debian's util-linux");
}

/// Reads what there is, as soon as there is something. Nothing is the end of the connection.
fn read(socket: &mut TcpStream, buffer: &mut [u8]) -> usize {
    loop {
        match socket.read(buffer) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => thread::yield_now(),
            result => return result.unwrap_or(0),
        }
    }
}

/// Reads just so many bytes, which must end a line.
fn take(socket: &mut TcpStream, mut count: usize, buffer: &mut [u8]) {
    while count > 0 {
        let share = count.min(buffer.len());
        let length = read(socket, &mut buffer[..share]);
        assert!(length > 0, "a connection has ended");
        count -= length;
        assert!(count > 0 || buffer[length - 1] == b'\n', "deliveries of another length");
    }
}

/// Reads up to these bytes. Returns whether they have come before the connection's end.
fn until(socket: &mut TcpStream, end: &str, buffer: &mut [u8]) -> bool {
    let mut last = Vec::<u8>::new();
    loop {
        let length = read(socket, buffer);
        last.extend(&buffer[..length]);
        if length == 0 || last.windows(end.len()).any(|window| window == end.as_bytes()) {
            return length > 0;
        }
        last.drain(..last.len().saturating_sub(end.len()));
    }
}

/// Sockets that hold nothing unread between two steps, and the process that they lead to: a
/// server, or the floor in its place. They are asked again and again, because on a virtual machine
/// waking up takes longer than what is measured.
struct Crowd {
    process: Server,
    people: Vec<TcpStream>,
    buffer: Vec<u8>,
}

impl Crowd {
    fn gather(command: &mut Command, count: usize) -> Crowd {
        let process = Server::start_as(command).expect("it starts");
        pin(process.child.id(), "1");
        let mut crowd = Crowd { process, people: Vec::new(), buffer: vec![0; 1 << 16] };
        crowd.join(count);
        crowd
    }

    fn floor(count: usize) -> Crowd {
        let this = std::env::current_exe().expect("this program");
        Crowd::gather(Command::new(this).arg(count.to_string()), count)
    }

    /// A server with so many in the room.
    fn room(server: &str, count: usize) -> Crowd {
        let mut crowd = Crowd::gather(&mut Command::new(server), count);
        crowd.fence();
        crowd
    }

    fn join(&mut self, count: usize) {
        for at in self.people.len()..count {
            let socket = TcpStream::connect(&self.process.address).expect("connects");
            socket.set_nodelay(true).expect("no delay");
            socket.set_nonblocking(true).expect("does not block");
            self.people.push(socket);
            self.say(at, &format!("NAME {}\n", name(at)));
        }
    }

    fn say(&mut self, at: usize, lines: &str) {
        self.people[at].write_all(lines.as_bytes()).expect("takes lines");
    }

    /// Everybody reads all that they were sent.
    fn fence(&mut self) {
        // By the second round everything has been dealt with, so nothing comes after its PONG.
        for (ping, pong) in [("PING 1\n", "PONG 1\r\n"), ("PING 2\n", "PONG 2\r\n")] {
            for socket in &mut self.people {
                socket.write_all(ping.as_bytes()).expect("takes a line");
                assert!(until(socket, pong, &mut self.buffer), "a connection has ended");
            }
        }
    }

    /// Microseconds of the process's time for one of something, of which a round does `count`; so
    /// do the functions below.
    fn cost(&mut self, rounds: usize, count: usize, mut round: impl FnMut(&mut Crowd)) -> f64 {
        let before = used(self.process.child.id());
        (0..rounds).for_each(|_| round(self));
        (used(self.process.child.id()) - before) / (rounds * count) as f64
    }

    /// Everybody receives so many messages, senders all but their own share.
    fn hear(&mut self, messages: usize, senders: usize) {
        for (at, socket) in self.people.iter_mut().enumerate() {
            let own = if at < senders { messages / senders } else { 0 };
            take(socket, received("MSG").len() * (messages - own), &mut self.buffer);
        }
    }

    /// The floor writes so many lines at once to everybody.
    fn write(&mut self, rounds: usize, lines: usize) -> f64 {
        self.cost(rounds, lines * self.people.len(), |floor| {
            floor.say(0, &format!("{lines:8}"));
            floor.hear(lines, 0);
        })
    }

    /// So many senders say so many messages each, at once.
    fn speak(&mut self, rounds: usize, senders: usize, messages: usize) -> f64 {
        let lines = format!("MSG {}\n", "x".repeat(TEXT)).repeat(messages);
        self.cost(rounds, senders * messages * (self.people.len() - 1), |crowd| {
            (0..senders).for_each(|at| crowd.say(at, &lines));
            crowd.hear(senders * messages, senders);
        })
    }

    /// One of each of twenty pairs writes to the other, and is told so.
    fn whisper(&mut self, rounds: usize) -> f64 {
        self.cost(rounds, 20, |crowd| {
            let line = |to| format!("PRIV @{} {}\n", name(to), "x".repeat(TEXT));
            (0..40).step_by(2).for_each(|at| crowd.say(at, &line(at + 1)));
            for socket in &mut crowd.people[..40] {
                take(socket, received("PRIV").len(), &mut crowd.buffer);
            }
        })
    }

    /// One joins and leaves, and everybody passes two fences.
    fn come_and_go(&mut self, rounds: usize) -> f64 {
        self.cost(rounds, 1, |crowd| {
            crowd.join(crowd.people.len() + 1);
            let mut last = crowd.people.pop().expect("one has joined");
            last.write_all(b"QUIT\n").expect("takes a line");
            while read(&mut last, &mut crowd.buffer) > 0 {}
            crowd.fence();
        })
    }
}

/// The bare loop: accepts so many connections; then the first says how many lines to write to each.
/// It shows where it listens as the server does.
fn floor(count: usize) -> io::Result<()> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    println!("2000-01-01T00:00:00Z listening on {}", listener.local_addr()?);
    let mut sockets: Vec<TcpStream> = Vec::new();
    for at in 0..count {
        sockets.push(listener.accept()?.0);
        sockets[at].set_nodelay(true)?;
        sockets[at].read_exact(&mut [0; "NAME p00000\n".len()])?;
    }
    let mut lines = [0; 8];
    while sockets[0].read_exact(&mut lines).is_ok() {
        let lines = String::from_utf8_lossy(&lines).trim().parse().unwrap_or(0);
        let bytes = received("MSG").repeat(lines);
        sockets.iter_mut().try_for_each(|socket| socket.write_all(bytes.as_bytes()))?;
    }
    Ok(())
}

/// Prints a row for each server. One after the first is compared with the first.
fn print(what: &str, of: &str, results: &[(f64, String)]) {
    for (at, (ratio, figures)) in results.iter().enumerate() {
        let change = match at {
            0 => String::new(),
            _ => format!(" ({:.2} × the first server)", ratio / results[0].0),
        };
        println!("| {what} | {ratio:.2} × {of}{change} | {figures} |");
    }
}

/// The servers to be measured, and the floor, with as many people each.
struct Rooms {
    floor: Crowd,
    crowds: Vec<Crowd>,
}

impl Rooms {
    fn gather(servers: &[String], people: usize) -> Rooms {
        // The floor makes do with what the limit on open files leaves for it.
        let floor = people.min(descriptor_limit().saturating_sub(people * servers.len()));
        let crowds = servers.iter().map(|server| Crowd::room(server, people)).collect();
        Rooms { floor: Crowd::floor(floor), crowds }
    }

    /// Measures the floor and the servers in turn, each by a function that returns microseconds.
    fn compare(
        &mut self,
        (what, of): (&str, &str),
        below: impl Fn(&mut Crowd) -> f64,
        above: impl Fn(&mut Crowd) -> f64,
    ) {
        let mut costs = vec![(Vec::new(), Vec::new()); self.crowds.len()];
        for _ in 0..ROUNDS {
            let floor = below(&mut self.floor);
            for (crowd, (ratios, costs)) in self.crowds.iter_mut().zip(&mut costs) {
                let cost = above(crowd);
                ratios.push(cost / floor);
                costs.push(cost);
            }
        }
        let results = costs.into_iter().map(|(ratios, costs)| (median(ratios), median(costs)));
        let results = results.map(|(ratio, cost)| (ratio, format!("{cost:.3} µs")));
        print(what, of, &results.collect::<Vec<_>>());
    }
}

/// Messages, private ones, joins and leaves in a room of so many.
fn room(servers: &[String], people: usize) {
    let mut rooms = Rooms::gather(servers, people);
    let (few, many) = ((60_000 / people).clamp(6, 200), (8000 / people).clamp(3, 60));
    for (what, rounds, senders, messages, lines, of) in [
        ("one message at a time", few, 1, 1, 1, "a floor write"),
        ("10 messages at a time", many, 10, 1, 1, "a floor write"),
        ("640 messages at a time", many, 10, 64, 640, "the floor's batches"),
    ] {
        let what = format!("a delivery in a room of {people}, {what}");
        let below = |floor: &mut Crowd| floor.write(rounds, lines);
        rooms.compare((&what, of), below, |crowd| crowd.speak(rounds, senders, messages));
    }
    if people >= 40 {
        let what = format!("private message with confirmation, room of {people}");
        let below = |floor: &mut Crowd| floor.write(few, 1);
        rooms.compare((&what, "a floor write"), below, |crowd| crowd.whisper(100));
        let what = format!("join and leave, room of {people}, and two PINGs from each");
        let below = |floor: &mut Crowd| floor.write(few, 1) * people as f64;
        let rounds = (10_000 / people).clamp(1, 20);
        rooms.compare((&what, "a write to each"), below, |crowd| crowd.come_and_go(rounds));
    }
}

/// Time from sending to what the last has received.
fn latency(servers: &[String]) {
    let time = |work: &mut dyn FnMut() -> f64| {
        thread::sleep(Duration::from_millis(50)); // the pace is what is measured at
        let begun = Instant::now();
        work();
        begun.elapsed().as_secs_f64() * 1e6
    };
    let what = ("latency to the last of 1000, 10 messages a second", "the floor");
    let below = |floor: &mut Crowd| time(&mut || floor.write(1, 1));
    Rooms::gather(servers, 1000).compare(what, below, |crowd| time(&mut || crowd.speak(1, 1, 1)));
}

/// How long the PINGs of one take, in milliseconds, while the first so many of the others send
/// these lines without pause, and everybody reads all the time. Infinitely long if it is removed.
fn bystander(mut crowd: Crowd, flooders: usize, lines: &str) -> Vec<f64> {
    let mut bystander = crowd.people.pop().expect("somebody");
    bystander.set_nonblocking(false).expect("blocks");
    bystander.set_read_timeout(Some(Duration::from_millis(5))).expect("a time-out");
    let (is_over, lines, mut times) = (AtomicBool::new(false), lines.repeat(10_000), Vec::new());
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut buffer = vec![0; 1 << 16];
            while !is_over.load(Ordering::Relaxed) {
                for (at, socket) in crowd.people.iter_mut().enumerate() {
                    // Where a write is cut, the next line is an unknown command.
                    let _ = if at < flooders { socket.write(lines.as_bytes()) } else { Ok(0) };
                    while matches!(socket.read(&mut buffer), Ok(1..)) {}
                }
            }
        });
        let since = Instant::now();
        while since.elapsed() < Duration::from_secs(3) {
            let begun = Instant::now();
            let _ = bystander.write_all(b"PING 1\n");
            let has_come = until(&mut bystander, "PONG 1\r\n", &mut crowd.buffer);
            times.push(if has_come { begun.elapsed().as_secs_f64() * 1e3 } else { f64::INFINITY });
            let begun = Instant::now();
            while begun.elapsed() < Duration::from_millis(10) {
                let _ = bystander.read(&mut crowd.buffer);
            }
        }
        is_over.store(true, Ordering::Relaxed);
    });
    times
}

fn flood(servers: &[String], people: usize, flooders: usize, lines: &str) {
    let one = |server: &String| {
        let write = Crowd::floor(people).write(50_000 / people, 1) * people as f64 / 1e3;
        let times = bystander(Crowd::room(server, people), flooders, lines);
        let (worst, middle) = (times.iter().copied().fold(0.0, f64::max), median(times));
        (middle / write, format!("{middle:.2} ms, at worst {worst:.2}"))
    };
    let what = format!("PING of a bystander, {flooders} of {people} send {lines:?} without pause");
    print(&what, "a write to each", &servers.iter().map(one).collect::<Vec<_>>());
}

/// Ten thousand come at once, do nothing, and go at once.
fn storm(servers: &[String]) {
    let people = 10_000;
    let mut results = [Vec::new(), Vec::new(), Vec::new()];
    for server in servers {
        let write = Crowd::floor(1000).write(60, 1);
        let mut crowd = Crowd::room(server, 0);
        let empty = crowd.process.memory();
        let cost = crowd.cost(1, people, |crowd| {
            crowd.join(people);
            crowd.fence();
        });
        results[0].push((cost / write, format!("{cost:.1} µs each")));
        let each = crowd.process.memory().saturating_sub(empty) / people;
        let wait = |_: &mut Crowd| thread::sleep(Duration::from_secs(5)); // nothing is to happen
        let idle = crowd.cost(1, 1000, wait);
        let figures = format!("{each} bytes each; {idle:.1} ms of processor in 5 s");
        results[1].push((each as f64 / 400.0, figures));
        let mut last = crowd.people.pop().expect("somebody");
        let cost = crowd.cost(1, people, |crowd| {
            crowd.people.clear();
            assert!(until(&mut last, " 1 disconnected\r\n", &mut crowd.buffer), "removed");
        });
        results[2].push((cost / write, format!("{cost:.1} µs each")));
    }
    print("10000 join at once", "a floor write for each", &results[0]);
    print("10000 who do nothing", "400 bytes each", &results[1]);
    print("all but one of 10000 disconnect at once", "a floor write for each", &results[2]);
}

fn main() {
    let words: Vec<_> = std::env::args().skip(1).filter(|word| word != "--bench").collect();
    // As it is started in `Crowd::floor`.
    if words.get(1).is_some_and(|word| word == "127.0.0.1:0") {
        return floor(words[0].parse().expect("a number")).expect("a network");
    }
    let limit = descriptor_limit();
    assert!(limit > 12_000, "12 300 open files are needed; raise the limit with ulimit -n");
    pin(std::process::id(), "0");
    let (mut servers, only): (Vec<_>, Vec<_>) = words.into_iter().partition(|it| it.contains('/'));
    if servers.is_empty() {
        servers.push(env!("CARGO_BIN_EXE_linechat-server").to_owned());
    }
    let is_asked = |part: &str| only.is_empty() || only.iter().any(|word| word == part);
    println!("| what | ratio | figures |\n|---|---|---|");
    for people in [10, 100, 1000, 10_000].into_iter().filter(|_| is_asked("rooms")) {
        room(&servers, people.min((limit - 2000) / servers.len()));
    }
    if is_asked("latency") {
        latency(&servers);
    }
    let floods = [(100, 1), (100, 20), (100, 99), (1000, 1), (1000, 20), (1000, 100), (3000, 20)];
    for (people, flooders) in floods.into_iter().filter(|_| is_asked("flood")) {
        // In the largest room they ask for the roster, too.
        let lines = if people == 3000 { "MSG x\nLIST\n" } else { "MSG x\n" };
        flood(&servers, people, flooders, lines);
    }
    if is_asked("storm") {
        storm(&servers);
    }
}
