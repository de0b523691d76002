//! Many people for a long time: they join, talk, whisper, stall, are reset and leave at random, and
//! everything that each receives is checked.
//!
//!     make soak                                     two thousand people, ten minutes
//!     cargo test --release --test soak -- 60        as many seconds
//!
//! One client, the observer, says nothing: what it receives is the history of the room, of which
//! everybody else must receive the part that history.rs says. Private messages are only load here;
//! the simulation checks them. At the end the server must have given its descriptors and its memory
//! back.

mod chance;
mod history;
mod person;
#[path = "../suite/process.rs"]
mod process;

use chance::Chance;
use history::{History, Received};
use person::Person;
use process::{descriptor_limit, Server, STUCK};
use std::collections::HashMap;
use std::io::ErrorKind;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

const PEOPLE: usize = 2000;

/// Each run begins with the same seed, so that it can be repeated.
const SEED: u64 = 0x2545_F491_4F6C_DD1D;

/// One of the crowd, whose socket is non-blocking.
struct Member {
    received: Received,
    person: Person,
    /// Lines for everybody that the observer may not have received yet.
    events: Vec<String>,
    messages: usize,
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
            received: Received::new(&name),
            person,
            events: Vec::new(),
            messages: 0,
            reads_again: None,
            is_welcome: false,
            is_leaving: false,
            has_ended: false,
        }
    }

    fn name(&self) -> &str {
        &self.received.name
    }

    /// The next line that is there.
    fn receive(&mut self) -> Option<String> {
        match self.person.next() {
            Ok(line) => {
                self.has_ended = line.is_none();
                line
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => None,
            Err(error) => panic!("{}: {error}", self.name()),
        }
    }

    fn quit(&mut self) {
        self.is_leaving = true;
        self.person.say("QUIT");
    }
}

struct Soak {
    server: Server,
    observer: Person,
    history: History,
    people: Vec<Option<Member>>,
    /// Members that have stopped reading, and are removed some time.
    stuck: HashMap<String, Member>,
    chance: Chance,
    counts: Counts,
}

#[derive(Default)]
struct Counts {
    joins: usize,
    deliveries: usize,
    whispers: usize,
    quits: usize,
    resets: usize,
    removed: usize,
}

impl Soak {
    fn step(&mut self, acts: usize) {
        (0..self.people.len()).for_each(|slot| self.receive(slot));
        // The observer reads all that the others can have received by now.
        self.observer.fence().iter().for_each(|line| self.observe(line));
        let (history, counts) = (&self.history, &mut self.counts);
        for slot in &mut self.people {
            let Some(member) = slot else { continue };
            counts.deliveries += member.events.len();
            for event in member.events.drain(..) {
                member.received.line(&event, history);
            }
            if member.has_ended {
                // The server removes no client that reads, so this one has quit.
                let name = member.name();
                assert!(member.is_leaving, "{name} was disconnected");
                let past = history.members.get(name).expect("a member");
                assert!(past.left.is_some(), "{name} has gone without LEFT");
                assert_eq!(past.said.len(), member.messages, "{name}'s messages");
                assert_eq!(member.received.next(history), b"", "{} misses this", member.name());
                *slot = None;
                counts.quits += 1;
            }
        }
        self.stuck.retain(|name, _| {
            let Some((_, reason)) = &history.members[name].left else { return true };
            // By the server, or by the kernel, for which its window was shut for a minute.
            assert!(["slow", "disconnected"].contains(&&**reason), "{name} left: {reason}");
            counts.removed += 1;
            false
        });
        for _ in 0..acts {
            let slot = self.chance.below(self.people.len());
            self.act(slot);
        }
    }

    /// The observer has received a line. Messages are numbered by their senders.
    fn observe(&mut self, line: &str) {
        self.history.push(line);
        if let ["MSG", from, number, ..] = line.split(' ').collect::<Vec<_>>()[..] {
            let expected = self.history.members[from].said.len();
            assert_eq!(number, expected.to_string(), "the number of {from}'s message");
        }
    }

    fn receive(&mut self, slot: usize) {
        let Some(member) = &mut self.people[slot] else { return };
        if member.reads_again.is_some_and(|again| again > Instant::now()) {
            return;
        }
        while let Some(line) = member.receive() {
            match line.split(' ').next() {
                Some("MSG" | "JOINED" | "LEFT" | "USERS") => member.events.push(line),
                Some("PRIV") => self.counts.whispers += 1,
                Some("WELCOME") => member.is_welcome = true,
                Some("HELLO" | "SENT" | "BYE") => {}
                _ if line.starts_with("ERR no-such-user ") => {}
                _ => panic!("{} received: {line}", member.name()),
            }
        }
    }

    fn act(&mut self, slot: usize) {
        let Some(member) = &mut self.people[slot] else {
            self.counts.joins += 1;
            let name = format!("p{}", self.counts.joins);
            self.people[slot] = Some(Member::connect(&self.server, name));
            return;
        };
        if member.reads_again.is_some_and(|again| again <= Instant::now()) {
            member.reads_again = None;
        }
        // No member says more than the budget lets through.
        let said = self.history.members.get(member.name()).map_or(0, |it| it.said.len());
        let is_waiting = said < member.messages;
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
                let to = self.people[other].as_ref().map(|other| other.name().to_owned());
                if let (Some(to), Some(member)) = (to, &mut self.people[slot]) {
                    member.person.say(&format!("PRIV @{to} psst"));
                }
            }
            85..=88 => member.quit(),
            89..=90 => {
                // Mostly with something unread, so the kernel resets the connection.
                self.people[slot] = None;
                self.counts.resets += 1;
            }
            91..=92 => {
                let pause = Duration::from_millis(self.chance.below(2000) as u64);
                member.reads_again = Some(Instant::now() + pause);
            }
            93 if self.stuck.len() < 20 => {
                if let Some(member) = self.people[slot].take() {
                    self.stuck.insert(member.name().to_owned(), member);
                }
            }
            _ => {}
        }
    }

    /// Everybody leaves.
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
            assert!(since.elapsed() < 4 * STUCK, "somebody who has quit is still connected");
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
    let observer = Person::join(&server.address, "observer");
    let (memory, open) = (server.memory(), server.descriptors().len());
    let mut soak = Soak {
        server,
        observer,
        history: History::default(),
        people: (0..PEOPLE.min(descriptor_limit())).map(|_| None).collect(),
        stuck: HashMap::new(),
        chance: Chance(SEED),
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
    let Soak { server, observer, history, counts, .. } = soak;
    observer.leave();
    let since = Instant::now();
    while server.descriptors().len() != open - 1 {
        assert!(since.elapsed() < STUCK, "descriptors: {open}, then {:?}", server.descriptors());
    }
    let after = server.memory();
    println!(
        "soak: {seconds} s, {} joins, {} KiB of history, {} deliveries, each line once and in order; \
         {} private messages, {} quits, {} resets, {} removed that did not read; memory {} KiB, at most {}, then {}",
        counts.joins,
        history.text.len() >> 10,
        counts.deliveries,
        counts.whispers,
        counts.quits,
        counts.resets,
        counts.removed,
        memory >> 10,
        most >> 10,
        after >> 10,
    );
    assert!(after < memory + 4 * 1024 * 1024, "the server keeps {} KiB", (after - memory) >> 10);
    println!("1 passed, 0 failed");
    ExitCode::SUCCESS
}
