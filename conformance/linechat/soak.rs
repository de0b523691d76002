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
mod person;
#[path = "../suite/process.rs"]
mod process;

use chance::Chance;
use person::Person;
use process::{descriptor_limit, Server, STUCK};
use std::collections::{HashMap, HashSet};
use std::io::ErrorKind;
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

    fn messages_of(&self, name: &str) -> usize {
        self.messages.get(name).copied().unwrap_or_default()
    }
}

/// Whispers to one member.
#[derive(Default)]
struct Whispers {
    received: HashSet<String>,
    confirmed: usize,
}

/// One of the crowd, whose socket does not wait.
struct Member {
    name: String,
    person: Person,
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

impl Member {
    fn connect(server: &Server, name: String) -> Member {
        let mut person = Person::connect(&server.address);
        person.say(&format!("NAME {name}"));
        person.socket().set_nonblocking(true).expect("does not block");
        Member {
            name,
            person,
            events: Vec::new(),
            position: None,
            messages: 0,
            whispers: 0,
            reads_again: None,
            is_welcome: false,
            is_leaving: false,
            has_ended: false,
        }
    }

    /// The next line that is there.
    fn receive(&mut self) -> Option<String> {
        match self.person.next() {
            Ok(line) => {
                self.has_ended = line.is_none();
                line
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => None,
            Err(error) => panic!("{}: {error}", self.name),
        }
    }

    fn quit(&mut self) {
        self.is_leaving = true;
        self.person.say("QUIT");
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
    people: Vec<Option<Member>>,
    whispers: HashMap<String, Whispers>,
    /// Who stopped reading for good, and may be removed.
    stuck: HashMap<String, Member>,
    chance: Chance,
    joins: usize,
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
    fn step(&mut self, acts: usize) {
        for slot in 0..self.people.len() {
            self.receive(slot);
        }
        // The observer reads all that the others can have received by now.
        for line in self.observer.fence() {
            self.log.add(&line);
        }
        for slot in 0..self.people.len() {
            let Some(member) = &mut self.people[slot] else { continue };
            self.counts.deliveries += member.events.len();
            member.check(&self.log);
            if member.has_ended {
                // Whoever reads is never removed: this one has quit.
                assert!(member.is_leaving, "{} was disconnected", member.name);
                let left = self.log.left[&member.name];
                assert!(member.has_all(&self.log, left), "{} misses lines", member.name);
                let sent = self.log.messages_of(&member.name);
                assert_eq!(sent, member.messages, "{}'s messages", member.name);
                self.people[slot] = None;
                self.counts.quits += 1;
            }
        }
        let (log, counts) = (&self.log, &mut self.counts);
        self.stuck.retain(|name, _| {
            let Some(&left) = log.left.get(name) else { return true };
            assert!(log.lines[left].text.ends_with(" slow"), "{}", log.lines[left].text);
            counts.slow += 1;
            false
        });
        for _ in 0..acts {
            let slot = self.chance.below(self.people.len());
            self.act(slot);
        }
    }

    fn receive(&mut self, slot: usize) {
        let Some(member) = &mut self.people[slot] else { return };
        if member.reads_again.is_some_and(|again| again > Instant::now()) {
            return;
        }
        while let Some(line) = member.receive() {
            let words: Vec<_> = line.split(' ').collect();
            match words.as_slice() {
                ["MSG" | "JOINED" | "LEFT", ..] => member.events.push(line),
                ["PRIV", from, number] => {
                    let whispers = self.whispers.entry(member.name.clone()).or_default();
                    let is_new = whispers.received.insert(format!("{from} {number}"));
                    assert!(is_new, "{} received twice: {line}", member.name);
                    self.counts.whispers += 1;
                }
                ["SENT", to, _] => {
                    self.whispers.entry((*to).to_owned()).or_default().confirmed += 1
                }
                ["WELCOME", ..] => member.is_welcome = true,
                ["USERS" | "HELLO" | "BYE", ..] | ["ERR", "no-such-user", ..] => {}
                _ => panic!("{} received: {line}", member.name),
            }
        }
    }

    fn act(&mut self, slot: usize) {
        let Some(member) = &mut self.people[slot] else {
            self.joins += 1;
            let name = format!("p{}", self.joins);
            self.people[slot] = Some(Member::connect(&self.server, name));
            return;
        };
        if member.reads_again.is_some_and(|again| again <= Instant::now()) {
            member.reads_again = None;
        }
        // Nobody says more than the room's budget lets through.
        let is_waiting = self.log.messages_of(&member.name) < member.messages;
        if !member.is_welcome || member.is_leaving || member.reads_again.is_some() || is_waiting {
            return;
        }
        match self.chance.below(100) {
            0..=54 => {
                member.messages += 1;
                let text = "la ".repeat(self.chance.below(40));
                member.person.say(&format!("MSG {} {text}", member.messages));
            }
            55..=84 => {
                let other = self.chance.below(self.people.len());
                let to = self.people[other].as_ref().map(|other| other.name.clone());
                if let (Some(to), Some(member)) = (to, &mut self.people[slot]) {
                    member.whispers += 1;
                    member.person.say(&format!("PRIV @{to} {}", member.whispers));
                }
            }
            85..=88 => member.quit(),
            89..=90 => {
                // Closed with something unread, most often: the kernel resets it.
                self.people[slot] = None;
                self.counts.resets += 1;
            }
            91..=92 => {
                let pause = Duration::from_millis(self.chance.below(2000) as u64);
                member.reads_again = Some(Instant::now() + pause);
            }
            93 if self.stuck.len() < 20 => {
                if let Some(member) = self.people[slot].take() {
                    self.stuck.insert(member.name.clone(), member);
                }
            }
            _ => {}
        }
    }

    /// Everybody still here leaves; nothing may be missing.
    fn wind_down(&mut self) {
        self.stuck.clear();
        let since = Instant::now();
        while self.people.iter().any(Option::is_some) {
            for member in self.people.iter_mut().flatten() {
                member.reads_again = None;
                if member.is_welcome && !member.is_leaving {
                    member.quit();
                }
            }
            self.step(0);
            assert!(since.elapsed() < 4 * STUCK, "somebody does not get away");
        }
        for (name, Whispers { received, confirmed }) in &self.whispers {
            let left = self.log.left.get(name).map(|&at| &self.log.lines[at].text);
            let has_quit = left.is_some_and(|line| line.ends_with(" quit"));
            let received = received.len();
            assert!(!has_quit || received >= *confirmed, "{name}: {received} of {confirmed}");
        }
    }
}

fn main() -> ExitCode {
    let seconds = std::env::args().nth(1).unwrap_or("5".to_owned());
    let Ok(seconds) = seconds.parse() else {
        eprintln!("soak: '{seconds}' is not a number of seconds");
        return ExitCode::from(2);
    };
    // Large pieces of memory are given back at once (mallopt(3)), so that what the server still has
    // at the end is what it still needs, and not what the allocator keeps.
    let mut command = Command::new(env!("CARGO_BIN_EXE_linechat-server"));
    let server = Server::start_as(command.env("MALLOC_MMAP_THRESHOLD_", "65536"));
    let server = server.expect("the server starts");
    let (memory, open) = (server.memory(), server.descriptors().len());
    let observer = Person::join(&server.address, "observer");
    let mut soak = Soak {
        server,
        observer,
        log: Log::default(),
        people: (0..PEOPLE.min(descriptor_limit())).map(|_| None).collect(),
        whispers: HashMap::new(),
        stuck: HashMap::new(),
        chance: Chance(SEED),
        joins: 0,
        counts: Counts::default(),
    };
    for slot in 0..soak.people.len() {
        soak.act(slot);
    }
    let end = Instant::now() + Duration::from_secs(seconds);
    let mut most = 0;
    while Instant::now() < end {
        soak.step(24);
        most = most.max(soak.server.memory());
    }
    soak.wind_down();
    let Soak { server, observer, log, joins, counts, .. } = soak;
    observer.leave();
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
