//! Two thousand clients for a long time on the real kernel: they join, talk, pause, stop reading, reset
//! their connections and quit at random.
//!
//!     make soak                                     ten minutes
//!     cargo test --release --test soak -- 60        as many seconds
//!
//! The observer says nothing, so it receives the history of the room. Every other client must receive
//! the part of it that history.rs says. At the end every request must have been carried out, and the
//! server must have given its descriptors and its memory back.

mod chance;
mod history;
mod person;
#[path = "../suite/process.rs"]
mod process;

use chance::Chance;
use history::{History, Received};
use person::Person;
use process::{descriptor_limit, Server, STUCK};
use std::io::ErrorKind;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

const CLIENTS: usize = 2000;
/// Each run begins with the same seed, so that it can be repeated.
const SEED: u64 = 0x2545_F491_4F6C_DD1D;

/// A client with a non-blocking socket, which asks for a name at once.
struct Member {
    number: usize,
    person: Person,
    received: Received,
    /// Lines for everybody that the observer may not have received yet.
    events: Vec<String>,
    /// `None`: the member no longer reads, until the server or the kernel removes it.
    reads_again: Option<Instant>,
    is_leaving: bool,
    has_ended: bool,
}

impl Member {
    fn connect(address: &str, number: usize) -> Member {
        let name = format!("p{number}");
        let mut person = Person::connect(address);
        person.say(&format!("NAME {name}"));
        person.socket().set_nonblocking(true).expect("does not block");
        Member {
            number,
            person,
            received: Received::new(&name),
            events: Vec::new(),
            reads_again: Some(Instant::now()),
            is_leaving: false,
            has_ended: false,
        }
    }

    /// Reads all that has arrived. A line that `Received` does not expect makes it fail later.
    fn receive(&mut self) {
        while self.reads() && !self.has_ended {
            match self.person.next() {
                Ok(Some(line)) if is_for_everybody(&line) => self.events.push(line),
                Ok(line) => self.has_ended = line.is_none(),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) => panic!("{}: {error}", self.received.name),
            }
        }
    }

    fn reads(&self) -> bool {
        self.reads_again.is_some_and(|again| again <= Instant::now())
    }

    fn quit(&mut self) {
        self.is_leaving = true;
        self.person.say("QUIT");
    }
}

fn is_for_everybody(line: &str) -> bool {
    !["HELLO ", "WELCOME ", "BYE "].iter().any(|start| line.starts_with(start))
}

struct Soak {
    server: Server,
    observer: Person,
    history: History,
    slots: Vec<Option<Member>>,
    chance: Chance,
    /// How many messages each member has sent, by its number.
    sent: Vec<usize>,
    deliveries: usize,
    resets: usize,
    removed: usize,
}

impl Soak {
    /// Every member reads, and what it has received is checked. Then random members act.
    fn step(&mut self, acts: usize) {
        self.slots.iter_mut().flatten().for_each(Member::receive);
        // The observer reads all that the others can have received by now.
        for line in self.observer.fence() {
            self.history.push(&line);
            if let ["MSG", from, number, ..] = line.split(' ').collect::<Vec<_>>()[..] {
                let expected = self.history.members[from].said.len();
                assert_eq!(number, expected.to_string(), "the number of {from}'s message");
            }
        }
        let history = &self.history;
        for slot in &mut self.slots {
            let Some(member) = slot else { continue };
            self.deliveries += member.events.len();
            member.events.drain(..).for_each(|event| member.received.line(&event, history));
            let name = &member.received.name;
            let left = history.members.get(name).and_then(|it| it.left.as_ref());
            if let (None, Some((_, reason))) = (member.reads_again, left) {
                // `disconnected`: its window was shut for so long that the kernel gave it up.
                assert!(["slow", "disconnected"].contains(&&**reason), "{name} left: {reason}");
                self.removed += 1;
                *slot = None;
            } else if member.has_ended {
                assert!(member.is_leaving, "{name} was disconnected though it reads");
                assert_eq!(member.received.next(history), b"", "p{} misses this", member.number);
                *slot = None;
            }
        }
        for _ in 0..acts {
            let slot = self.chance.below(self.slots.len());
            self.act(slot);
        }
    }

    fn act(&mut self, slot: usize) {
        let Some(member) = &mut self.slots[slot] else {
            self.slots[slot] = Some(Member::connect(&self.server.address, self.sent.len()));
            return self.sent.push(0);
        };
        let said = self.history.members.get(&member.received.name).map_or(0, |it| it.said.len());
        let sent = &mut self.sent[member.number];
        // The server may have let the last message wait for the budget.
        if member.is_leaving || !member.reads() || said < *sent {
            return;
        }
        match self.chance.below(1000) {
            0..=859 => {
                *sent += 1;
                let text = "la ".repeat(self.chance.below(40));
                member.person.say(&format!("MSG {sent} {text}"));
            }
            860..=899 => member.quit(),
            900..=919 => {
                // Mostly something is unread, so the kernel resets the connection.
                *sent += 1;
                member.person.say(&format!("MSG {sent} last words"));
                self.slots[slot] = None;
                self.resets += 1;
            }
            920..=939 => {
                let pause = Duration::from_millis(self.chance.below(2000) as u64);
                member.reads_again = Some(Instant::now() + pause);
            }
            940 if said > 0 => member.reads_again = None,
            _ => {}
        }
    }

    /// Every member that reads quits; the others close their connections.
    fn wind_down(&mut self) {
        for slot in &mut self.slots {
            drop(slot.take_if(|member| member.reads_again.is_none()));
            let Some(member) = slot else { continue };
            member.reads_again = Some(Instant::now());
            if !member.is_leaving {
                member.quit();
            }
        }
        let since = Instant::now();
        let mut gone = 0;
        while self.slots.iter().any(Option::is_some) || gone < self.sent.len() {
            self.step(0);
            gone = self.history.members.values().filter(|it| it.left.is_some()).count();
            assert!(since.elapsed() < 4 * STUCK, "a client that is gone is still in the room");
        }
    }
}

fn main() -> ExitCode {
    let seconds = std::env::args().nth(1).unwrap_or("5".to_owned());
    let Ok(seconds) = seconds.parse() else {
        eprintln!("soak: '{seconds}' is not a number of seconds");
        return ExitCode::from(2);
    };
    // The allocator gives large pieces of memory back at once (mallopt(3)), so that the server's
    // memory is what it still needs.
    let mut command = Command::new(env!("CARGO_BIN_EXE_linechat-server"));
    let server = Server::start_as(command.env("MALLOC_MMAP_THRESHOLD_", "65536"));
    let server = server.expect("the server starts");
    let observer = Person::join(&server.address, "observer");
    let (memory, open) = (server.memory(), server.descriptors().len());
    let mut soak = Soak {
        server,
        observer,
        history: History::default(),
        slots: (0..CLIENTS.min(descriptor_limit())).map(|_| None).collect(),
        chance: Chance(SEED),
        sent: Vec::new(),
        deliveries: 0,
        resets: 0,
        removed: 0,
    };
    (0..soak.slots.len()).for_each(|slot| soak.act(slot));
    let end = Instant::now() + Duration::from_secs(seconds);
    let mut most = 0;
    while Instant::now() < end {
        soak.step(24);
        most = most.max(soak.server.memory());
    }
    soak.wind_down();
    let Soak { server, observer, history, sent, deliveries, resets, removed, .. } = soak;
    observer.leave();
    let since = Instant::now();
    while server.descriptors().len() != open - 1 {
        assert!(since.elapsed() < STUCK, "descriptors: {open}, then {:?}", server.descriptors());
    }
    for (number, &sent) in sent.iter().enumerate() {
        let said = &history.members[&format!("p{number}")].said;
        assert_eq!(said.len(), sent, "messages of p{number}");
    }
    let after = server.memory();
    println!(
        "soak: {seconds} s, {} joins, {} KiB of history, {deliveries} deliveries, each line once and in \
         order; {resets} resets, {removed} removed that did not read; memory {} KiB, at most {}, then {}",
        sent.len(),
        history.text.len() >> 10,
        memory >> 10,
        most >> 10,
        after >> 10,
    );
    assert!(after < memory + 4 * 1024 * 1024, "the server keeps {} KiB", (after - memory) >> 10);
    println!("1 passed, 0 failed");
    ExitCode::SUCCESS
}
