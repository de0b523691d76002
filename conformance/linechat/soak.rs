//! Many people for a long time: they join, talk, whisper, stall, are reset and leave at random, and
//! everything that each receives is counted again independently.
//!
//!     make soak                                     two thousand people, ten minutes
//!     cargo test --release --test soak -- 60        as many seconds
//!
//! One who only watches, the observer, keeps a log of all that happens in the room. What anybody
//! else receives between their WELCOME and their end must be that log without their own messages,
//! line for line: nothing lost, doubled, or out of order. Each sender's messages are numbered, and
//! so are the whispers, of which each must arrive at most once, and each that was confirmed must
//! have arrived.

mod chance;
#[path = "../suite/process.rs"]
mod process;

use chance::Chance;
use process::{descriptor_limit, Server, STUCK};
use std::collections::{HashMap, HashSet};
use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

const PEOPLE: usize = 2000;

/// What a run begins with, so that it can be repeated.
const SEED: u64 = 0x2545_F491_4F6C_DD1D;

struct Line {
    text: String,
    /// Whose message it is, if it is one.
    from: Option<String>,
}

impl Line {
    fn new(text: &str) -> Line {
        let mut words = text.split(' ');
        let from =
            (words.next() == Some("MSG")).then(|| words.next().unwrap_or_default().to_owned());
        Line { text: text.to_owned(), from }
    }
}

/// All that happened in the room, as the observer saw it.
#[derive(Default)]
struct Log {
    lines: Vec<Line>,
    joined: HashMap<String, usize>,
    left: HashMap<String, usize>,
    /// How many messages there are of each sender.
    messages: HashMap<String, usize>,
}

impl Log {
    fn add(&mut self, text: &str) {
        let words: Vec<_> = text.split(' ').collect();
        let at = self.lines.len();
        match words.as_slice() {
            ["JOINED", name, _] => drop(self.joined.insert((*name).to_owned(), at)),
            ["LEFT", name, ..] => drop(self.left.insert((*name).to_owned(), at)),
            ["MSG", from, number, ..] => {
                let messages = self.messages.entry((*from).to_owned()).or_default();
                *messages += 1;
                assert_eq!(*number, messages.to_string(), "{from}'s messages are numbered");
            }
            // Pushed while the room is small; whoever joins and leaves is in the lines above.
            ["USERS", ..] => return,
            _ => panic!("the observer received: {text}"),
        }
        self.lines.push(Line::new(text));
    }
}

/// Whispers to one person.
#[derive(Default)]
struct Whispers {
    received: HashSet<String>,
    confirmed: usize,
}

struct Person {
    name: String,
    socket: TcpStream,
    received: Vec<u8>,
    /// Lines to be compared with the log.
    events: Vec<String>,
    /// Where in the log the next of them must stand, once it is known.
    position: Option<usize>,
    messages: usize,
    whispers: usize,
    reads_again: Option<Instant>,
    is_welcome: bool,
    is_leaving: bool,
    has_ended: bool,
}

impl Person {
    fn connect(server: &Server, name: String) -> Person {
        let socket = TcpStream::connect(&server.address).expect("connects");
        socket.set_nodelay(true).expect("no delay");
        let mut person = Person {
            name,
            socket,
            received: Vec::new(),
            events: Vec::new(),
            position: None,
            messages: 0,
            whispers: 0,
            reads_again: None,
            is_welcome: false,
            is_leaving: false,
            has_ended: false,
        };
        person.say(&format!("NAME {}", person.name));
        person.socket.set_nonblocking(true).expect("non-blocking");
        person
    }

    /// Sends a line. What one says here is far less than a socket takes at once.
    fn say(&mut self, line: &str) {
        self.socket.write_all(format!("{line}\n").as_bytes()).expect("the server takes a line");
    }

    /// Receives what there is, and hands on every whole line.
    fn receive(&mut self, buffer: &mut [u8], mut line: impl FnMut(&mut Person, &str)) {
        loop {
            match self.socket.read(buffer) {
                Ok(0) => {
                    self.has_ended = true;
                    break;
                }
                Ok(length) => self.received.extend(&buffer[..length]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => {
                    panic!("{}: {error}", self.name);
                }
            }
        }
        let received = std::mem::take(&mut self.received);
        let mut rest = received.as_slice();
        while let Some(end) = rest.iter().position(|&byte| byte == b'\n') {
            let text = std::str::from_utf8(&rest[..end]).expect("UTF-8");
            line(self, text.strip_suffix('\r').expect("CRLF"));
            rest = &rest[end + 1..];
        }
        self.received = rest.to_vec();
    }

    /// Compares what has been received with the log, as far as it has come.
    fn check(&mut self, log: &Log) {
        let Some(mut position) = self.position.or_else(|| Some(log.joined.get(&self.name)? + 1))
        else {
            assert!(self.events.is_empty(), "{} hears of the room before joining it", self.name);
            return;
        };
        for event in self.events.drain(..) {
            while log.lines[position].from.as_ref() == Some(&self.name) {
                position += 1;
            }
            assert_eq!(event, log.lines[position].text, "what {} received", self.name);
            position += 1;
        }
        self.position = Some(position);
    }

    /// Whether everything up to `end` in the log has been received.
    fn has_all(&self, log: &Log, end: usize) -> bool {
        let position = self.position.unwrap_or(end);
        log.lines[position..end].iter().all(|line| line.from.as_ref() == Some(&self.name))
    }
}

struct Soak {
    server: Server,
    observer: Person,
    log: Log,
    people: Vec<Option<Person>>,
    whispers: HashMap<String, Whispers>,
    /// Who stopped reading for good, and will be removed.
    stuck: HashMap<String, Person>,
    chance: Chance,
    joins: usize,
    fences: usize,
    counts: Counts,
}

#[derive(Default)]
struct Counts {
    deliveries: usize,
    whispers: usize,
    quits: usize,
    resets: usize,
    slow: usize,
}

impl Soak {
    fn step(&mut self, buffer: &mut [u8], is_winding_down: bool) {
        for slot in 0..self.people.len() {
            self.receive(slot, buffer);
        }
        self.fence_observer(buffer);
        for slot in 0..self.people.len() {
            let Some(person) = &mut self.people[slot] else { continue };
            self.counts.deliveries += person.events.len();
            person.check(&self.log);
            if person.has_ended {
                assert!(person.is_leaving, "{} was disconnected", person.name);
                let left = self.log.left[&person.name];
                assert!(person.has_all(&self.log, left), "{} misses lines", person.name);
                let sent = self.log.messages.get(&person.name).copied().unwrap_or_default();
                assert_eq!(sent, person.messages, "{}'s messages", person.name);
                self.people[slot] = None;
                self.counts.quits += 1;
            }
        }
        let log = &self.log;
        let before = self.stuck.len();
        self.stuck.retain(|name, _| !log.left.contains_key(name));
        self.counts.slow += before - self.stuck.len();
        for _ in 0..if is_winding_down { 0 } else { 24 } {
            let slot = self.chance.below(self.people.len());
            self.act(slot);
        }
    }

    fn receive(&mut self, slot: usize, buffer: &mut [u8]) {
        let Some(person) = &mut self.people[slot] else { return };
        if person.reads_again.is_some_and(|again| again > Instant::now()) {
            return;
        }
        let whispers = &mut self.whispers;
        let counts = &mut self.counts;
        person.receive(buffer, |person, line| {
            let words: Vec<_> = line.split(' ').collect();
            match words.as_slice() {
                ["MSG" | "JOINED" | "LEFT", ..] => person.events.push(line.to_owned()),
                ["PRIV", from, number] => {
                    let whispers = whispers.entry(person.name.clone()).or_default();
                    let is_new = whispers.received.insert(format!("{from} {number}"));
                    assert!(is_new, "{} received twice: {line}", person.name);
                    counts.whispers += 1;
                }
                ["SENT", to, _] => whispers.entry((*to).to_owned()).or_default().confirmed += 1,
                ["WELCOME", ..] => person.is_welcome = true,
                ["USERS" | "HELLO" | "BYE", ..] | ["ERR", "no-such-user", ..] => {}
                _ => panic!("{} received: {line}", person.name),
            }
        });
    }

    /// Has the observer read all that the others can have received by now.
    fn fence_observer(&mut self, buffer: &mut [u8]) {
        self.fences += 1;
        self.observer.say(&format!("PING {}", self.fences));
        let pong = format!("PONG {}", self.fences);
        let mut has_come = false;
        let since = Instant::now();
        while !has_come {
            let log = &mut self.log;
            self.observer.receive(buffer, |_, line| match line {
                _ if line == pong => has_come = true,
                _ if line.starts_with("HELLO") || line.starts_with("WELCOME") => {}
                _ => log.add(line),
            });
            assert!(since.elapsed() < STUCK, "the observer is not answered");
        }
    }

    fn act(&mut self, slot: usize) {
        let Some(person) = &mut self.people[slot] else {
            self.joins += 1;
            let name = format!("p{}", self.joins);
            self.people[slot] = Some(Person::connect(&self.server, name));
            return;
        };
        if !person.is_welcome || person.is_leaving || person.reads_again.is_some() {
            if person.reads_again.is_some_and(|again| again <= Instant::now()) {
                person.reads_again = None;
            }
            return;
        }
        match self.chance.below(100) {
            0..=54 => {
                person.messages += 1;
                let text = "la ".repeat(self.chance.below(40));
                person.say(&format!("MSG {} {text}", person.messages));
            }
            55..=84 => {
                let other = self.chance.below(self.people.len());
                let to = self.people[other].as_ref().map(|other| other.name.clone());
                if let (Some(to), Some(person)) = (to, &mut self.people[slot]) {
                    person.whispers += 1;
                    person.say(&format!("PRIV @{to} {}", person.whispers));
                }
            }
            85..=88 => {
                person.is_leaving = true;
                person.say("QUIT");
            }
            89..=90 => {
                // Closed with something unread, most often: the kernel resets it.
                self.people[slot] = None;
                self.counts.resets += 1;
            }
            91..=92 => {
                let pause = Duration::from_millis(self.chance.below(2000) as u64);
                person.reads_again = Some(Instant::now() + pause);
            }
            93 if self.stuck.len() < 20 => {
                if let Some(person) = self.people[slot].take() {
                    self.stuck.insert(person.name.clone(), person);
                }
            }
            _ => {}
        }
    }

    /// Everybody still here leaves; nothing may be missing.
    fn wind_down(&mut self, buffer: &mut [u8]) {
        self.stuck.clear();
        for person in self.people.iter_mut().flatten() {
            person.reads_again = None;
        }
        let since = Instant::now();
        while self.people.iter().any(Option::is_some) {
            for person in self.people.iter_mut().flatten() {
                if person.is_welcome && !person.is_leaving {
                    person.is_leaving = true;
                    person.say("QUIT");
                }
            }
            self.step(buffer, true);
            assert!(since.elapsed() < 4 * STUCK, "somebody does not get away");
        }
        for (name, whispers) in &self.whispers {
            let is_reset = !self.log.left.contains_key(name) || {
                let left = &self.log.lines[self.log.left[name]].text;
                !left.ends_with(" quit")
            };
            let (received, confirmed) = (whispers.received.len(), whispers.confirmed);
            assert!(
                is_reset || received >= confirmed,
                "{name}: {received} of {confirmed} whispers"
            );
        }
    }
}

fn main() -> ExitCode {
    let seconds = std::env::args().nth(1).unwrap_or("5".to_owned());
    let Ok(seconds) = seconds.parse() else {
        eprintln!("soak: '{seconds}' is not a number of seconds");
        return ExitCode::from(2);
    };
    let mut buffer = vec![0; 256 * 1024];
    // Large pieces of memory are given back at once (mallopt(3)), so that what the server still has
    // at the end is what it still needs, and not what the allocator keeps.
    let mut command = Command::new(env!("CARGO_BIN_EXE_linechat-server"));
    let server = Server::start_as(command.env("MALLOC_MMAP_THRESHOLD_", "65536"));
    let server = server.expect("the server starts");
    let (memory, open) = (server.memory(), server.descriptors().len());
    let observer = Person::connect(&server, "observer".to_owned());
    let mut soak = Soak {
        server,
        observer,
        log: Log::default(),
        people: (0..PEOPLE.min(descriptor_limit())).map(|_| None).collect(),
        whispers: HashMap::new(),
        stuck: HashMap::new(),
        chance: Chance(SEED),
        joins: 0,
        fences: 0,
        counts: Counts::default(),
    };
    for slot in 0..soak.people.len() {
        soak.act(slot);
    }
    let end = Instant::now() + Duration::from_secs(seconds);
    let mut most = 0;
    while Instant::now() < end {
        soak.step(&mut buffer, false);
        most = most.max(soak.server.memory());
    }
    soak.wind_down(&mut buffer);
    let Soak { server, observer, log, joins, counts, .. } = soak;
    drop(observer);
    let since = Instant::now();
    while server.descriptors().len() != open {
        assert!(since.elapsed() < STUCK, "descriptors: {open}, then {:?}", server.descriptors());
    }
    let after = server.memory();
    println!(
        "soak: {seconds} s, {joins} joins, {} events, {} deliveries and {} whispers, each once and \
         in order; {} quits, {} resets, {} removed as slow; memory {} KiB, at most {}, then {}",
        log.lines.len(),
        counts.deliveries,
        counts.whispers,
        counts.quits,
        counts.resets,
        counts.slow,
        memory >> 10,
        most >> 10,
        after >> 10,
    );
    assert!(after < memory + 4 * 1024 * 1024, "the server keeps {} KiB", (after - memory) >> 10);
    println!("1 passed, 0 failed");
    ExitCode::SUCCESS
}
