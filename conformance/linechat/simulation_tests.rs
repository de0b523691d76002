//! The whole server, unchanged, among random people in a simulated network (simulation.rs), and what
//! must hold whatever they do.
//!
//!     cargo test simulation                              always the same runs, and the scenarios
//!     LINECHAT_SIMULATE=60 cargo test --release random   other runs, for 60 seconds
//!     LINECHAT_SEED=123 cargo test --release random      the run of which a failure says so
//!
//! A run (`Simulation`) is a server and a `Crowd`. Each `Person` has a kind (what they send), a way
//! of reading, and an end. One more, the observer p0, reads everything at once and says nothing: what
//! it receives is the `History`, the one order of all that happens in the room. The history itself is
//! checked against what was asked for. Everybody else's stream must be the history from their own
//! joining to their own leaving, without their own messages, and between its lines the replies and
//! private messages that they are due, in order. At the end everybody leaves, and the server's books
//! must be empty.
//!
//! Situations that are not left to chance are in scenarios.rs.

#[path = "scenarios.rs"]
mod scenarios;

use super::os::{self, chance::Chance, Buffers, Conditions, Peer, Peers};
use super::*;
use std::cell::RefCell;
use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// Seeds of the runs that every `cargo test` makes: quick ones.
const SEEDS: [u64; 23] = [
    63, 114, 57, 79, 105, 78, 90, 5, 70, 46, 101, 86, 92, 127, 68, 102, 62, 12, 80, 104, 108, 50,
    23,
];
/// Those of runs that once failed.
const ONCE_FAILED: [u64; 2] = [1795655665663694720, 1795655726719773136];

const fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

// The history: what happens in the room, in the one order of it

/// A message in the history: where it stands, and its sender's number for it.
struct Said {
    start: usize,
    end: usize,
    number: usize,
}

/// A person that is or was in the room.
#[derive(Default)]
struct Membership {
    name: String,
    /// Where the line of their joining ends, and where that of their leaving begins.
    joined: Option<usize>,
    left: Option<usize>,
    left_at: Duration,
    was_slow: bool,
    said: Vec<Said>,
}

#[derive(Default)]
struct History {
    text: Vec<u8>,
    /// Everybody who has ever connected, by their number.
    people: Vec<Membership>,
    /// The people in the room, in the order of joining.
    room: Vec<usize>,
    /// The people in the room from one place in the history on.
    rooms: Vec<(usize, Rc<[usize]>)>,
    /// Where rosters begin.
    rosters: Vec<usize>,
    /// Lines of the roster that the observer has not received, and whether the first of them has
    /// come.
    roster: VecDeque<String>,
    is_in_roster: bool,
    /// Whether rosters were withheld in the last turn, and in the one before. What the observer
    /// receives in one turn can be from either.
    withholds: [bool; 2],
    /// What all of it costs while the budget applies, in bytes.
    cost: usize,
}

impl History {
    /// The person with this name; names are `p`, a number, and sometimes a tail that makes them long.
    fn person_named(&self, name: &str) -> usize {
        let digits = name[1..].split('-').next().unwrap_or_default();
        let id: usize = digits.parse().unwrap_or_else(|_| panic!("no person is named {name}"));
        assert_eq!(self.people[id].name, name);
        id
    }

    /// The people in the room at a place in the history.
    fn room_at(&self, position: usize) -> &[usize] {
        let after = self.rooms.partition_point(|(from, _)| *from <= position);
        &self.rooms[after - 1].1
    }

    fn roster_lines(&self, room: &[usize]) -> VecDeque<String> {
        let head = format!("USERS {}", room.len());
        let mut lines = VecDeque::from([head.clone()]);
        for &id in room {
            let name = &self.people[id].name;
            let last = lines.back_mut().expect("one line at least");
            if last.len() + 1 + name.len() + 2 > 4096 {
                lines.push_back(format!("{head} {name}"));
            } else {
                last.push(' ');
                last.push_str(name);
            }
        }
        lines
    }

    fn room_has_changed(&mut self) {
        self.rooms.push((self.text.len(), self.room.as_slice().into()));
        self.roster = match self.room.len() {
            1..=100 => self.roster_lines(&self.room),
            _ => VecDeque::new(),
        };
    }

    /// Appends a line that everybody in the room receives, and that costs so much.
    fn push(&mut self, line: &str, cost: usize) {
        self.text.extend(line.as_bytes());
        self.text.extend(b"\r\n");
        self.cost += cost;
    }
}

// A person: what they send, and what they must receive

/// What a person sends.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Observer,
    /// Gives no name.
    Silent,
    /// Something of everything, with a pause before each.
    Talker {
        pause: Duration,
    },
    /// One kind of request, as many as fit, again and again.
    Flooder {
        request: Flood,
        pause: Duration,
    },
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Flood {
    Msg { length: usize },
    Priv { to: usize },
    List,
    Ping,
    Mixed,
}

/// How a person reads.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Reading {
    Eager,
    /// So many bytes a second on the average, but `step` at once, then a pause.
    Steady {
        rate: usize,
        step: usize,
    },
    Never,
}

/// How a person's connection ends.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Ending {
    Quit,
    HalfClose,
    Close,
    Reset,
    Vanish,
}

#[derive(Clone, Copy, Debug)]
struct Behaviour {
    kind: Kind,
    reading: Reading,
    buffers: Buffers,
    address: IpAddr,
    has_long_name: bool,
    /// After how much time, and how, the connection ends. `comes_again`: another one follows at
    /// once, with a new name.
    ending: Option<(Duration, Ending)>,
    comes_again: bool,
    /// Every request is answered, and every message passed on, within this.
    max_delay: Option<Duration>,
}

impl Default for Behaviour {
    fn default() -> Self {
        Behaviour {
            kind: Kind::Talker { pause: seconds(2) },
            reading: Reading::Eager,
            buffers: Buffers::default(),
            address: IpAddr::from([10, 0, 0, 1]),
            has_long_name: false,
            ending: None,
            comes_again: false,
            max_delay: None,
        }
    }
}

impl Behaviour {
    /// Whether PROTOCOL.md promises that such a client is never removed.
    fn is_promised_to_stay(&self) -> bool {
        match self.reading {
            Reading::Eager => true,
            Reading::Steady { rate, step } => rate >= 64 * 1024 && step <= 2 * 1024 * 1024,
            Reading::Never => false,
        }
    }
}

/// What the server must answer next.
#[derive(Debug)]
enum Reply {
    /// A line that begins so, and whose rest is free.
    Start(&'static str),
    Welcome,
    Pong {
        number: usize,
        since: Duration,
    },
    Sent {
        to: usize,
        text: String,
    },
    List,
}

#[derive(Clone, Copy, Debug, Default, PartialEq)]
enum Phase {
    #[default]
    Open,
    /// Refused by the server: full, or no name was given in time.
    Refused,
    /// Has sent QUIT, or ended their side of the stream, and waits for the end.
    Leaving { reason: &'static str },
    /// Removed as slow, which is still to be announced.
    Removed,
    /// Has closed or lost the connection, perhaps after QUIT.
    Gone,
}

/// A message on its way: where it ends among the bytes that its sender has sent, and since when.
struct Message {
    number: usize,
    text: String,
    end: usize,
    since: Duration,
}

#[derive(Default)]
struct Person {
    id: usize,
    peer: Peer,
    behaviour: Behaviour,
    phase: Phase,
    came: Duration,
    welcomed: Duration,
    /// Where in the log the next line that they receive stands, and their own next message.
    position: usize,
    own: usize,
    /// Taken and not yet checked.
    received: Vec<u8>,
    expected: VecDeque<Reply>,
    list: VecDeque<String>,
    sending: VecDeque<Message>,
    number: usize,
    sent: usize,
    is_greeted: bool,
    has_asked_for_name: bool,
    has_quit: bool,
    /// Received all up to the end of the stream.
    has_all: bool,
    /// How much they can still take now, and since when.
    credit: usize,
    refilled: Duration,
    is_refilling: bool,
    /// Of whom they have received how many private messages, and the last one's number.
    whispers: BTreeMap<usize, (usize, usize)>,
    /// To whom how many private messages have been confirmed.
    confirmed: BTreeMap<usize, usize>,
    /// Pending output at the server before its last turn, in bytes.
    pending: usize,
}

impl Person {
    fn new(id: usize, peer: Peer, behaviour: Behaviour) -> Self {
        let (now, hello) = (os::time(), Reply::Start("HELLO linechat/1 "));
        Person {
            id,
            peer,
            behaviour,
            came: now,
            welcomed: Duration::MAX,
            refilled: now,
            expected: VecDeque::from([hello]),
            ..Person::default()
        }
    }

    fn send(&mut self, line: &str) {
        self.sent += line.len() + 1;
        self.peer.send(line.as_bytes());
        self.peer.send(b"\n");
    }

    /// Sends a line that is answered with one that begins so.
    fn ask(&mut self, line: &str, answer: &'static str) {
        self.send(line);
        self.expected.push_back(Reply::Start(answer));
    }

    fn ping(&mut self) {
        self.number += 1;
        self.send(&format!("PING {}", self.number));
        self.expected.push_back(Reply::Pong { number: self.number, since: os::time() });
    }

    fn say(&mut self, length: usize) {
        self.number += 1;
        let text = format!("{} {}", self.number, "x".repeat(length));
        self.send(&format!("MSG {text}"));
        let (number, end, since) = (self.number, self.sent, os::time());
        self.sending.push_back(Message { number, text, end, since });
    }

    fn list(&mut self) {
        self.send("LIST");
        self.expected.push_back(Reply::List);
    }

    fn whisper(&mut self, to: usize, history: &History, length: usize) {
        self.number += 1;
        let text = format!("{} {to} {}", self.number, "x".repeat(length));
        self.send(&format!("PRIV @{} {text}", history.people[to].name));
        self.expected.push_back(Reply::Sent { to, text });
    }

    /// Checks what has been received, as far as lines are complete. Returns false if the observer is
    /// still to receive some of it: a LEFT that is logged while the server writes is written to some
    /// clients in that turn, and to the others in the next.
    fn check(&mut self, history: &History) -> bool {
        let received = mem::take(&mut self.received);
        let (mut rest, mut is_early) = (received.as_slice(), false);
        while !rest.is_empty() {
            self.skip_own(history);
            let own = history.people[self.id].said.get(self.own);
            let end = own.map_or(history.text.len(), |own| own.start);
            let events = if self.position == 0 { &[] } else { &history.text[self.position..end] };
            // Mostly all of it is what the log says.
            let line = rest.iter().position(|&byte| byte == b'\n').map_or(rest.len(), |at| at + 1);
            let all = rest.len().min(events.len()).max(line);
            let matching = [all, line].into_iter().find(|&it| events.starts_with(&rest[..it]));
            is_early = self.position == history.text.len() && rest.starts_with(b"LEFT ");
            if let Some(length) = matching {
                self.position += length;
                rest = &rest[length..];
            } else if rest[line - 1] == b'\n' && !is_early {
                let text = std::str::from_utf8(&rest[..line]).expect("UTF-8");
                self.reply(text.strip_suffix("\r\n").expect("CRLF"), history);
                rest = &rest[line..];
            } else {
                break;
            }
        }
        self.received = rest.to_vec();
        !is_early
    }

    /// A line that is not in the history: the next reply, or a private message.
    fn reply(&mut self, line: &str, history: &History) {
        if let Some(next) = self.list.pop_front() {
            return assert_eq!(line, next);
        }
        if line.starts_with("PRIV ") {
            return self.receive_whisper(line, history);
        }
        let name = &history.people[self.id].name;
        match self.expected.pop_front() {
            Some(Reply::Start("HELLO linechat/1 ")) if line.starts_with("ERR full ") => {
                self.phase = Phase::Refused;
            }
            Some(Reply::Start(start)) => {
                assert!(line.starts_with(start), "{start}: {line}");
                self.is_greeted = true;
            }
            Some(Reply::Welcome) => {
                self.position = history.people[self.id].joined.expect("the others are told, too");
                let count = history.room_at(self.position).len();
                assert_eq!(line, format!("WELCOME {name} {count}"));
                self.welcomed = os::time();
            }
            Some(Reply::Pong { number, since }) => {
                assert_eq!(line, format!("PONG {number}"));
                self.check_fence(number, history);
                self.was_in_time(since);
            }
            Some(Reply::Sent { to, text }) => {
                let to_name = &history.people[to].name;
                if history.room_at(self.position).contains(&to) {
                    assert_eq!(line, format!("SENT {to_name} {text}"));
                    *self.confirmed.entry(to).or_default() += 1;
                } else {
                    assert!(line.starts_with("ERR no-such-user "), "{to_name} is away: {line}");
                }
            }
            Some(Reply::List) if !line.starts_with("USERS ") => {
                self.take_roster_for_reply(history);
                self.reply(line, history);
            }
            Some(Reply::List) => {
                self.list = history.roster_lines(history.room_at(self.position));
                assert_eq!(self.list.pop_front().as_deref(), Some(line));
            }
            None if line.starts_with("ERR timeout ") && !self.has_asked_for_name => {
                assert!(os::time() >= self.came + NAME_TIMEOUT, "timeout after too short a time");
                self.phase = Phase::Refused;
            }
            None => panic!("{name} has asked for nothing: {line}"),
        }
    }

    /// The roster in the history that was received last was the same lines in a reply to LIST, and is
    /// itself still to come. That happens when it was withheld before.
    fn take_roster_for_reply(&mut self, history: &History) {
        let after = history.rosters.partition_point(|&start| start < self.position);
        let start = history.rosters[after.checked_sub(1).expect("a reply to LIST")];
        let roster = history.roster_lines(history.room_at(start));
        let position = mem::replace(&mut self.position, start);
        self.position += roster.iter().map(|line| line.len() + 2).sum::<usize>();
        self.own = history.people[self.id].said.partition_point(|said| said.start < start);
        let own = self.own;
        self.skip_own(history);
        assert_eq!(self.position, position, "LIST is not answered");
        (self.position, self.own) = (start, own);
    }

    /// Before the answer to a PING all comes that was caused before it.
    fn check_fence(&self, number: usize, history: &History) {
        let Membership { name, said, .. } = &history.people[self.id];
        let is_passed = said.get(self.own).is_none_or(|own| own.number > number);
        assert!(is_passed, "{name} has not received all that came before the PING");
        let is_said = self.sending.front().is_none_or(|own| own.number > number);
        assert!(is_said, "something that {name} said before the PING is not passed on");
    }

    fn receive_whisper(&mut self, line: &str, history: &History) {
        let mut words = line.splitn(5, ' ').skip(1);
        let from = history.person_named(words.next().expect("a name"));
        let number = words.next().and_then(|number| number.parse().ok()).expect("a number");
        assert_eq!(words.next(), Some(&*self.id.to_string()), "a message for somebody else");
        let (count, last) = self.whispers.get(&from).copied().unwrap_or_default();
        assert!(number > last, "private message {number} of p{from} comes after {last}");
        self.whispers.insert(from, (count + 1, number));
        // It stands at its place among what its sender said to everybody.
        let said = &history.people[from].said;
        let next = said.partition_point(|said| said.number < number);
        let comes_late = said.get(next).is_some_and(|next| next.start < self.position);
        let comes_early = next > 0 && said[next - 1].start >= self.position;
        assert!(from == self.id || !(comes_late || comes_early), "{line} is not at its place");
    }

    /// How many of the numbered requests have been answered, if all are PING.
    fn pongs(&self) -> usize {
        self.number - self.expected.len()
    }

    fn was_in_time(&self, since: Duration) {
        if let Some(max_delay) = self.behaviour.max_delay {
            let delay = os::time().saturating_sub(since.max(self.welcomed));
            assert!(delay <= max_delay, "p{} waited {delay:?} for an answer", self.id);
        }
    }

    /// The end of the stream has come.
    fn check_end(&mut self, history: &History) {
        let membership = &history.people[self.id];
        match self.phase {
            Phase::Open => {
                assert!(!self.behaviour.is_promised_to_stay(), "{} is cut off", membership.name);
                self.phase = Phase::Removed;
                return;
            }
            Phase::Refused | Phase::Removed | Phase::Gone => {}
            Phase::Leaving { .. } => {
                // A client that takes the rest too slowly is dropped after a while.
                let is_eager = self.behaviour.reading == Reading::Eager;
                if is_eager || os::time() - membership.left_at < CLOSE_TIMEOUT {
                    assert!(self.received.is_empty(), "{} gets half a line", membership.name);
                    self.check_all(history, membership.left);
                    self.has_all = true;
                }
            }
        }
        self.phase = Phase::Gone;
    }

    /// All requests are answered, and all up to `end` in the log is received.
    fn check_all(&mut self, history: &History, end: Option<usize>) {
        let membership = &history.people[self.id];
        self.skip_own(history);
        let is_answered = self.expected.is_empty() && self.list.is_empty();
        assert!(is_answered, "{}: {:?} is not answered", membership.name, self.expected);
        let is_whole = membership.joined.is_none() || end == Some(self.position);
        assert!(is_whole, "{} is at {} of {end:?}", membership.name, self.position);
    }

    /// Nobody receives their own messages.
    fn skip_own(&mut self, history: &History) {
        let said = &history.people[self.id].said;
        while said.get(self.own).is_some_and(|own| own.start == self.position) {
            self.position = said[self.own].end;
            self.own += 1;
        }
    }
}

// The crowd: everybody, and when they act

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    /// One of `Crowd::coming` connects.
    Come(usize),
    Act(usize),
    /// A steady reader can take more.
    Refill(usize),
    /// A connection that has vanished fails, or one that is finished is closed.
    Vanish(usize),
    Close(usize),
}

struct Crowd {
    chance: Chance,
    history: History,
    people: Vec<Person>,
    coming: Vec<Behaviour>,
    events: BinaryHeap<Reverse<(Duration, usize, Event)>>,
    scheduled: usize,
    /// What the observer has received of a line.
    observed: Vec<u8>,
    /// People that have received something before the observer.
    early: Vec<usize>,
    /// No requests are sent any longer.
    is_over: bool,
    /// When the budget began to apply; `None` while it does not.
    budget_since: Option<Duration>,
}

impl Peers for Crowd {
    fn next(&self) -> Option<Duration> {
        self.events.peek().map(|Reverse((time, ..))| *time)
    }

    fn act(&mut self) {
        while self.next().is_some_and(|next| next <= os::time()) {
            let Some(Reverse((_, _, event))) = self.events.pop() else { return };
            match event {
                Event::Come(_) if self.is_over => {}
                Event::Come(at) => drop(self.add(self.coming[at])),
                Event::Act(id) => self.act_as(id),
                Event::Refill(id) => self.refill(id),
                Event::Vanish(id) => self.people[id].peer.time_out(),
                Event::Close(id) => self.people[id].peer.close(),
            }
        }
    }
}

impl Crowd {
    fn new(seed: u64) -> Self {
        Crowd {
            chance: Chance(seed.wrapping_mul(0xD134_2543_DE82_EF95) | 1),
            history: History::default(),
            people: Vec::new(),
            coming: Vec::new(),
            events: BinaryHeap::new(),
            scheduled: 0,
            observed: Vec::new(),
            early: Vec::new(),
            is_over: false,
            budget_since: None,
        }
    }

    fn schedule(&mut self, after: Duration, event: Event) {
        self.scheduled += 1;
        self.events.push(Reverse((os::time() + after, self.scheduled, event)));
    }

    /// Somebody will connect.
    fn expect(&mut self, after: Duration, behaviour: Behaviour) {
        self.schedule(after, Event::Come(self.coming.len()));
        self.coming.push(behaviour);
    }

    /// Somebody connects, and will act.
    fn add(&mut self, behaviour: Behaviour) -> usize {
        let id = self.people.len();
        let name = match behaviour.has_long_name {
            true => format!("{:x<50}", format!("p{id}-")),
            false => format!("p{id}"),
        };
        let port = 1024 + (id % 60_000) as u16;
        let peer = Peer::connect((behaviour.address, port).into(), behaviour.buffers);
        assert_eq!(peer.number(), id);
        self.history.people.push(Membership { name, ..Membership::default() });
        self.people.push(Person::new(id, peer, behaviour));
        self.schedule(Duration::ZERO, Event::Act(id));
        if let Reading::Steady { rate, step } = behaviour.reading {
            let period = Duration::from_secs_f64(step as f64 / rate as f64);
            let phase = self.chance.below(1000) as u32;
            self.people[id].is_refilling = true;
            self.schedule(period * phase / 1000, Event::Refill(id));
        }
        id
    }

    fn act_as(&mut self, id: usize) {
        let person = &mut self.people[id];
        if person.phase != Phase::Open || self.is_over {
            return;
        }
        if let Some((after, ending)) = person.behaviour.ending {
            if os::time() >= person.came + after {
                return self.end(id, ending);
            }
        }
        if person.behaviour.kind == Kind::Silent {
            return;
        }
        if !person.has_asked_for_name {
            self.ask_for_name(id);
        }
        let pause = match self.people[id].behaviour.kind {
            Kind::Observer | Kind::Silent => return,
            Kind::Talker { pause } => {
                self.talk(id);
                pause * (500 + self.chance.below(1000) as u32) / 1000
            }
            Kind::Flooder { request, pause } => {
                let peer = self.people[id].peer;
                while peer.unread() < 8 * 1024 && !peer.is_dropped() {
                    self.flood(id, request);
                }
                pause
            }
        };
        let ends = self.people[id].behaviour.ending.map(|(after, _)| self.people[id].came + after);
        let left = ends.map_or(Duration::MAX, |ends| ends.saturating_sub(os::time()));
        self.schedule(pause.min(left), Event::Act(id));
    }

    fn ask_for_name(&mut self, id: usize) {
        let person = &mut self.people[id];
        person.has_asked_for_name = true;
        if person.behaviour.kind != Kind::Observer {
            match self.chance.below(10) {
                0 => person.ask("NAME P0", "ERR name-taken "),
                1 => person.ask("NAME two words", "ERR bad-name "),
                2 => person.ask("MSG hello?", "ERR not-named "),
                3 => person.ping(),
                _ => {}
            }
        }
        person.send(&format!("NAME {}", self.history.people[id].name));
        person.expected.push_back(Reply::Welcome);
    }

    fn talk(&mut self, id: usize) {
        let other = 1 + self.chance.below(self.people.len() - 1);
        let length = match self.chance.below(20) {
            // A person that must be answered soon does not ask for much.
            0 if self.people[id].behaviour.max_delay.is_none() => self.chance.below(3900),
            _ => self.chance.below(60),
        };
        let person = &mut self.people[id];
        match self.chance.below(20) {
            0..=8 => person.say(length),
            9..=13 => self.whisper(id, other, length),
            14..=15 => person.ping(),
            16 => person.list(),
            17 => person.ask("MSG \u{202e}", "ERR bad-text "),
            18 => person.ask("nonsense", "ERR unknown-command "),
            _ => {
                person.send("HELP");
                person.expected.extend([(); 7].map(|()| Reply::Start("HELP ")));
            }
        }
    }

    fn whisper(&mut self, id: usize, to: usize, length: usize) {
        self.people[id].whisper(to, &self.history, length);
    }

    fn flood(&mut self, id: usize, request: Flood) {
        match request {
            Flood::Msg { length } => self.people[id].say(length),
            Flood::Priv { to } => self.whisper(id, to.min(self.people.len() - 1), 0),
            Flood::List => self.people[id].list(),
            Flood::Ping => self.people[id].ping(),
            Flood::Mixed => self.talk(id),
        }
    }

    fn end(&mut self, id: usize, ending: Ending) {
        let person = &mut self.people[id];
        match ending {
            Ending::Quit => {
                person.ask("QUIT", "BYE");
                person.has_quit = true;
                person.phase = Phase::Leaving { reason: "quit" };
            }
            Ending::HalfClose => {
                person.peer.send(b"MSG unfinish");
                person.peer.half_close();
                person.phase = Phase::Leaving { reason: "disconnected" };
            }
            Ending::Close => person.peer.close(),
            Ending::Reset => person.peer.reset(),
            Ending::Vanish => self.schedule(seconds(60), Event::Vanish(id)),
        }
        let person = &mut self.people[id];
        if person.phase == Phase::Open {
            person.phase = Phase::Gone;
        }
        if person.phase == Phase::Gone {
            self.comes_again(id);
        }
    }

    fn comes_again(&mut self, id: usize) {
        let behaviour = self.people[id].behaviour;
        if behaviour.comes_again {
            self.expect(Duration::from_micros(100), behaviour);
        }
    }

    fn refill(&mut self, id: usize) {
        let person = &mut self.people[id];
        if let Reading::Steady { step, .. } = person.behaviour.reading {
            person.credit = step;
            person.refilled = os::time();
            person.is_refilling = false;
            self.read(id);
        }
    }

    /// Takes what there is, as far as this one reads, and checks it.
    fn read(&mut self, id: usize) {
        let person = &mut self.people[id];
        if matches!(person.phase, Phase::Removed | Phase::Gone) {
            return;
        }
        match person.behaviour.reading {
            Reading::Never => {}
            Reading::Eager => drop(person.peer.take(usize::MAX, &mut person.received)),
            Reading::Steady { rate, step } => {
                person.credit -= person.peer.take(person.credit, &mut person.received);
                if person.credit == 0 && !mem::replace(&mut person.is_refilling, true) {
                    let period = Duration::from_secs_f64(step as f64 / rate as f64);
                    let next = (person.refilled + period).saturating_sub(os::time());
                    self.schedule(next, Event::Refill(id));
                }
            }
        }
        let person = &mut self.people[id];
        if !person.check(&self.history) {
            return self.early.push(id);
        }
        if person.peer.sees_end() {
            person.check_end(&self.history);
            let delay = Duration::from_millis(self.chance.below(20_000) as u64);
            self.schedule(delay, Event::Close(id));
            self.comes_again(id);
        } else if person.peer.was_reset() {
            // Closing has its time-outs, and a refused client may have sent more than is read.
            let is_eager = person.behaviour.reading == Reading::Eager;
            person.phase = match person.phase {
                Phase::Leaving { .. } if !is_eager => Phase::Gone,
                Phase::Open if !person.is_greeted => Phase::Gone,
                Phase::Open if !person.behaviour.is_promised_to_stay() => Phase::Removed,
                Phase::Refused => Phase::Gone,
                _ => panic!("p{id} is reset"),
            };
            self.comes_again(id);
        }
    }

    /// After each turn of the server: everybody looks at what has come.
    fn look(&mut self) {
        self.observe();
        let early = mem::take(&mut self.early).into_iter();
        let touched = os::touched().into_iter().map(Peer::number);
        early.chain(touched).for_each(|id| self.read(id));
    }

    // What the observer sees

    fn observe(&mut self) {
        self.people[0].peer.take(usize::MAX, &mut self.observed);
        let observed = mem::take(&mut self.observed);
        let mut rest = observed.as_slice();
        while let Some(end) = rest.iter().position(|&byte| byte == b'\n') {
            let line = std::str::from_utf8(&rest[..end]).expect("UTF-8");
            self.observe_line(line.strip_suffix('\r').expect("CRLF"));
            rest = &rest[end + 1..];
        }
        self.observed = rest.to_vec();
    }

    fn observe_line(&mut self, line: &str) {
        let History { text, rosters, roster, is_in_roster, withholds, .. } = &mut self.history;
        if line.starts_with("USERS ") {
            assert_eq!(Some(line), roster.pop_front().as_deref());
            assert!(withholds.contains(&false), "a roster while the budget applies");
            if !mem::replace(is_in_roster, !roster.is_empty()) {
                rosters.push(text.len());
            }
            return self.history.push(line, 0);
        }
        let may_come_later = withholds.contains(&true) && !*is_in_roster;
        assert!(roster.is_empty() || may_come_later, "{line} instead of a roster");
        let words: Vec<&str> = line.splitn(3, ' ').collect();
        match words.as_slice() {
            ["HELLO" | "BYE", ..] => {}
            ["WELCOME", "p0", "1"] => self.joins(0, line),
            ["JOINED", name, count] => {
                self.joins(self.history.person_named(name), line);
                assert_eq!(*count, self.history.room.len().to_string());
            }
            ["LEFT", name, rest] => {
                let id = self.history.person_named(name);
                let (count, reason) = rest.split_once(' ').expect("a reason");
                self.leaves(id, line, reason);
                assert_eq!(count, self.history.room.len().to_string());
            }
            ["MSG", name, text] => self.is_said(self.history.person_named(name), line, text),
            _ => panic!("the observer receives: {line}"),
        }
    }

    fn joins(&mut self, id: usize, line: &str) {
        assert!(self.people[id].has_asked_for_name && self.history.people[id].joined.is_none());
        // JOINED, and LEFT later.
        self.history.push(line, 2 * self.history.people[id].name.len() + 43);
        self.history.people[id].joined = Some(self.history.text.len());
        self.history.room.push(id);
        self.history.room_has_changed();
    }

    fn is_said(&mut self, id: usize, line: &str, text: &str) {
        let membership = &self.history.people[id];
        assert!(
            membership.joined.is_some() && membership.left.is_none(),
            "nobody here says: {line}"
        );
        let message = self.people[id].sending.pop_front().expect("something that was said");
        assert_eq!(text, message.text, "the next line of p{id}");
        self.people[id].was_in_time(message.since);
        let start = self.history.text.len();
        self.history.push(line, line.len() + 2);
        let end = self.history.text.len();
        self.history.people[id].said.push(Said { start, end, number: message.number });
    }

    fn leaves(&mut self, id: usize, line: &str, reason: &str) {
        let person = &self.people[id];
        match (reason, person.phase) {
            ("slow", _) => self.is_slow(id),
            ("quit", _) => assert!(person.has_quit),
            ("disconnected", Phase::Gone | Phase::Leaving { reason: "disconnected" }) => {}
            _ => panic!("{:?} is told of as: {line}", person.phase),
        }
        // All that had arrived by then has been carried out.
        let next = person.sending.front();
        let is_left_out = next.is_some_and(|next| next.end <= person.peer.all_arrived());
        assert!(reason == "slow" || !is_left_out, "lines that p{id} had sent are left out");
        let membership = &mut self.history.people[id];
        assert!(membership.joined.is_some() && membership.left.is_none());
        membership.left = Some(self.history.text.len());
        membership.left_at = os::time();
        membership.was_slow = reason == "slow";
        self.history.push(line, 0);
        self.history.room.retain(|&other| other != id);
        self.history.room_has_changed();
    }

    /// What has been confirmed to its sender has arrived, if its recipient did not go before.
    fn check_whispers(&self, id: usize) {
        for (&to, &confirmed) in &self.people[id].confirmed {
            let recipient = &self.people[to];
            let received = recipient.whispers.get(&id).map_or(0, |whispers| whispers.0);
            assert!(!recipient.has_all || received >= confirmed, "p{to} misses messages of p{id}");
        }
    }

    /// A person is removed as slow: PROTOCOL.md must allow it.
    fn is_slow(&self, id: usize) {
        let person = &self.people[id];
        let is_promised = person.behaviour.is_promised_to_stay() && person.phase == Phase::Open;
        assert!(!is_promised, "p{id} is removed: {:?}", person.behaviour.reading);
        let since = |time: Duration| os::time().saturating_sub(time);
        let stalled =
            since(person.peer.all_written().1).min(self.budget_since.map_or(Duration::ZERO, since));
        // The server counts from the beginning of a turn.
        let turn = Duration::from_millis(50);
        let is_stalled = person.pending > 0 && stalled + turn >= STALL_TIMEOUT;
        let most_in_a_turn = 256 * 1024;
        let is_just = is_stalled || person.pending > HARD_LIMIT - most_in_a_turn;
        assert!(is_just, "p{id} is removed with {} bytes after {stalled:?}", person.pending);
    }
}

// The simulation: a server, and a crowd

/// A server in a network of its own, and what its console has shown.
struct Session {
    server: Server,
    texts: Receiver<String>,
    console: String,
}

fn options() -> Options {
    Options {
        address: Address { host: None, port: DEFAULT_PORT },
        max_clients: usize::MAX,
        max_per_ip: Some(0),
        name_timeout: NAME_TIMEOUT,
        verbose: false,
    }
}

impl Session {
    fn new(seed: u64, conditions: Conditions, options: Options) -> Self {
        let (listener, signals) = os::begin(seed, conditions);
        let (console, texts) = Console::new();
        let server = Server::new(options, listener, signals, console).expect("a server");
        Session { server, texts, console: String::new() }
    }

    fn turn(&mut self) {
        self.server.turn().expect("the poller works");
        self.console.extend(self.texts.try_iter());
        self.server.console.pending.store(0, Ordering::Relaxed);
        assert_eq!(os::misuse(), Vec::<String>::new());
    }

    fn run(&mut self, time: Duration) {
        let end = os::time() + time;
        os::set_alarm(Some(end));
        while os::time() < end && !self.server.has_stopped() {
            self.turn();
        }
        os::set_alarm(None);
    }

    /// A connection from one address, on which `lines` are sent.
    fn connect(&mut self, address: impl Into<IpAddr>, lines: &str) -> Peer {
        let peer = Peer::connect((address.into(), 1024).into(), Buffers::default());
        peer.send(lines.as_bytes());
        self.run(Duration::from_millis(1));
        peer
    }

    /// The pending output of the client in this slot.
    fn pending(&self, id: Id) -> usize {
        let Room { clients, log, .. } = &self.server.room;
        clients.get(id).expect("a client").outbox.pending(log)
    }

    /// The first line on a new connection.
    fn greeting(&mut self, address: impl Into<IpAddr>) -> String {
        take_lines(self.connect(address, "")).remove(0)
    }
}

/// All that has come to a peer, by line.
fn take_lines(peer: Peer) -> Vec<String> {
    let mut bytes = Vec::new();
    peer.take(usize::MAX, &mut bytes);
    String::from_utf8(bytes).expect("UTF-8").lines().map(str::to_owned).collect()
}

struct Simulation {
    session: Session,
    crowd: Rc<RefCell<Crowd>>,
}

impl Simulation {
    /// A server with the observer in its room.
    fn new(seed: u64, conditions: Conditions, options: Options) -> Self {
        let session = Session::new(seed, conditions, options);
        let crowd = Rc::new(RefCell::new(Crowd::new(seed)));
        os::set_peers(crowd.clone());
        let mut simulation = Simulation { session, crowd };
        let buffers = Buffers::UNLIMITED;
        simulation.add(Behaviour { kind: Kind::Observer, buffers, ..Behaviour::default() });
        simulation.run(Duration::from_millis(1));
        simulation
    }

    fn add(&mut self, behaviour: Behaviour) -> usize {
        self.crowd.borrow_mut().add(behaviour)
    }

    fn turn(&mut self) {
        self.before_turn();
        self.session.turn();
        self.crowd.borrow_mut().look();
    }

    /// What the checks of the next turn must know.
    fn before_turn(&mut self) {
        let Server { room, .. } = &self.session.server;
        let Room { budget, .. } = room;
        let crowd = &mut *self.crowd.borrow_mut();
        let History { withholds, .. } = &mut crowd.history;
        *withholds = [budget.applies(), withholds[0]];
        let since = crowd.budget_since.unwrap_or(os::time());
        crowd.budget_since = budget.applies().then_some(since);
        for (_, client) in room.clients.iter() {
            let number = client.socket.peer().number();
            crowd.people[number].pending = client.outbox.pending(&room.log);
        }
    }

    fn run(&mut self, time: Duration) {
        let end = os::time() + time;
        os::set_alarm(Some(end));
        while os::time() < end {
            self.turn();
            assert!(os::calls().bytes < 1 << 32, "a flood goes on without limit");
        }
        os::set_alarm(None);
    }

    // The end of a run

    /// No requests are sent any longer, and people that do not read leave. The others must receive
    /// all that they are due. Then everybody leaves, and the books are empty.
    fn wind_down(&mut self) {
        let everybody = {
            let mut crowd = self.crowd.borrow_mut();
            crowd.is_over = true;
            0..crowd.people.len()
        };
        for id in everybody.clone() {
            let mut crowd = self.crowd.borrow_mut();
            let person = &crowd.people[id];
            if !person.behaviour.is_promised_to_stay() && person.phase != Phase::Gone {
                crowd.end(id, Ending::Reset);
                crowd.people[id].phase = Phase::Gone;
            }
        }
        self.run(seconds(300));
        for id in everybody.clone() {
            let mut crowd = self.crowd.borrow_mut();
            let Crowd { people, history, .. } = &mut *crowd;
            if id > 0 && people[id].phase == Phase::Open {
                people[id].check_all(history, Some(history.text.len()));
                crowd.end(id, Ending::Quit);
            }
        }
        self.run(seconds(200));
        self.check_books();
        let mut crowd = self.crowd.borrow_mut();
        assert_eq!(crowd.history.room, [0], "still in the room");
        assert!(crowd.history.roster.is_empty(), "a roster is owed");
        everybody.for_each(|id| crowd.check_whispers(id));
        crowd.end(0, Ending::Close);
        drop(crowd);
        self.run(seconds(20));
        self.check_books_are_empty();
    }

    /// What must be true of the server's books after every turn.
    fn check_books(&self) {
        let Server { room, ip_groups, to_serve, options, next_deadline, .. } = &self.session.server;
        let Room { clients, members, by_name, log, budget, .. } = room;
        let count = |is: fn(&Client) -> bool| clients.iter().filter(|it| is(it.1)).count();
        let named = count(|it| it.name.is_some());
        assert!(clients.count() <= options.max_clients);
        assert_eq!(ip_groups.values().sum::<usize>(), clients.count());
        assert_eq!(os::descriptors(), clients.count());
        assert_eq!((members.len(), by_name.len(), room.names().count()), (named, named, named));
        assert_eq!(budget.queue.waiting.len(), count(|it| it.waiting_request.is_some()));
        assert!(budget.queue.finishes.len() <= clients.count());
        assert_eq!(room.own_bytes, clients.iter().map(|it| it.1.outbox.own_bytes).sum::<usize>());
        let mut slowest = log.end();
        // Lines that are logged after the writing count from the next turn on.
        let is_written = self.session.server.written == log.end() && room.writes.is_empty();
        for (id, client) in clients.iter() {
            let Client { name, outbox, deadline, unprocessed, decoder, state, .. } = client;
            let pending = outbox.pending(log);
            assert!(name.as_ref().is_none_or(|name| by_name[&name_key(name)] == id));
            slowest = slowest.min(outbox.cursor(log).unwrap_or(slowest));
            if is_written {
                assert_eq!(
                    budget.over_soft_limit.contains(&id),
                    pending > SOFT_LIMIT,
                    "{pending} bytes"
                );
            }
            assert!(pending <= HARD_LIMIT + 256 * 1024, "{pending} bytes are pending");
            assert!(outbox.until_reply <= outbox.own_bytes);
            let inserted = outbox.inserts.iter().map(|it| it.own.len()).sum::<usize>();
            assert_eq!(inserted, outbox.own_bytes);
            assert!(deadline.is_none_or(|it| next_deadline.is_some_and(|next| next <= it)));
            let needs_deadline = match state {
                State::Open if name.is_some() => is_written && pending > 0,
                State::Failed => name.is_none(),
                _ => true,
            };
            assert!(deadline.is_some() || !needs_deadline, "{state:?} without a deadline");
            let is_queued = || to_serve.waiting.keys().any(|key| key.1 == id);
            assert!(unprocessed.is_empty() || !client.takes_requests() || is_queued(), "forgotten");
            assert!(unprocessed.len() <= 16 * 1024 && decoder.line.capacity() <= 16 * 1024);
        }
        assert!(slowest >= log.start, "the log lacks {} bytes", log.start - slowest);
        let needed = (log.end() - slowest) as usize;
        let is_trimmed = log.bytes.len() <= 2 * needed + 64 * 1024;
        assert!(is_trimmed || room.may_trim, "a log of {} bytes for {needed}", log.bytes.len());
    }

    fn check_books_are_empty(&self) {
        self.check_books();
        let Server { room, to_serve, .. } = &self.session.server;
        let Room { budget, .. } = room;
        assert_eq!((room.clients.count(), room.own_bytes, budget.over_soft_limit.len()), (0, 0, 0));
        assert!(to_serve.waiting.is_empty() && budget.queue.finishes.is_empty());
        assert!(room.log.bytes.is_empty() && room.writes.is_empty());
    }
}

// Runs by chance

fn pick<T: Copy>(chance: &mut Chance, from: &[T]) -> T {
    from[chance.below(from.len())]
}

/// What a run's people have in common.
#[derive(Debug)]
struct Plan {
    people: usize,
    /// About how long a person pauses between two requests.
    pace: Duration,
    length: Duration,
    /// Of a hundred people so many flood, read slowly or never, and come and go.
    flooders: usize,
    slow: usize,
    restless: usize,
    max_clients: usize,
    conditions: Conditions,
    /// After so many bytes moved by the server it is wound down.
    most_bytes: usize,
}

impl Plan {
    fn new(chance: &mut Chance) -> Self {
        let people = pick(chance, &[3, 5, 5, 10, 10, 20, 50, 120, 250]);
        let pace =
            Duration::from_millis(pick(chance, &[10, 100, 1000, 10_000, 600_000, 6_000_000]));
        Plan {
            people,
            pace,
            length: pace * 100 + seconds(300),
            flooders: pick(chance, &[0, 5, 30, 30]),
            slow: pick(chance, &[0, 20, 50, 50]),
            restless: pick(chance, &[0, 5, 50]),
            max_clients: pick(chance, &[usize::MAX, usize::MAX, usize::MAX, people]),
            most_bytes: pick(chance, &[4, 16, 64]) << 20,
            conditions: Conditions {
                partial: pick(chance, &[0, 0, 10, 50]),
                call_cost: Duration::from_nanos(pick(chance, &[0, 3500])),
                kib_cost: Duration::from_nanos(300),
            },
        }
    }

    fn behaviour(&self, chance: &mut Chance, number: usize) -> Behaviour {
        let mut is = |percent: usize| chance.below(100) < percent;
        let (floods, is_slow, is_restless, is_silent) =
            (is(self.flooders), is(self.slow), is(self.restless), is(3));
        let pause = self.pace * (100 + chance.below(1900) as u32) / 1000;
        let length = pick(chance, &[0, 0, 50, 3000]);
        let to = 1 + chance.below(self.people);
        let requests = [Flood::Msg { length }, Flood::Priv { to }, Flood::List, Flood::Ping];
        let other = pick(chance, &requests);
        let request = pick(chance, &[requests[0], other, Flood::Mixed]);
        let flood_pause = Duration::from_millis(pick(chance, &[1, 100, 1000]));
        let is_typist = !floods && !is_slow && pause >= seconds(1);
        let ending =
            Duration::from_millis(chance.below(2 * self.length.as_millis() as usize) as u64);
        let endings =
            [Ending::Quit, Ending::HalfClose, Ending::Close, Ending::Reset, Ending::Vanish];
        let number = number as u16;
        let addresses = [
            IpAddr::from([10, 0, (number >> 8) as u8, number as u8]),
            IpAddr::from([0x2001, 0xdb8, 0, number, 0, 0, 0, 1]),
            IpAddr::from([0, 0, 0, 0, 0, 0xffff, 0x0a01, number]),
        ];
        Behaviour {
            kind: match (is_silent, floods) {
                (true, _) => Kind::Silent,
                (_, true) => Kind::Flooder { request, pause: flood_pause },
                _ => Kind::Talker { pause },
            },
            reading: if is_slow { random_reading(chance) } else { Reading::Eager },
            buffers: if is_typist { Buffers::default() } else { random_buffers(chance) },
            address: pick(chance, &addresses),
            has_long_name: chance.below(4) == 0,
            ending: Some((if is_restless { ending / 50 } else { ending }, pick(chance, &endings))),
            comes_again: is_restless || chance.below(2) == 0,
            // Everybody else gets as much of the budget meanwhile; twice their number, because the
            // requests of people that have left wait, too.
            max_delay: (is_typist && self.conditions.partial == 0).then_some(
                Duration::from_millis(200) + seconds(2 * 200 * self.people as u64) / 65_536,
            ),
        }
    }
}

fn random_reading(chance: &mut Chance) -> Reading {
    let rate = pick(chance, &[500, 5000, 12_000, 40_000, 65_536, 65_536, 70_000, 300_000]);
    let step = pick(chance, &[100, 1500, 65_536, 700_000, 2 * 1024 * 1024]);
    match chance.below(5) {
        0 => Reading::Never,
        _ => Reading::Steady { rate, step: step.min(rate * 50) },
    }
}

fn random_buffers(chance: &mut Chance) -> Buffers {
    let sizes = [100, 1500, 4096, 65_536, 65_536, 1024 * 1024];
    let window = pick(chance, &sizes);
    let step = (window / pick(chance, &[2, 16, 1000])).max(1);
    let [receive, unsent] = [(); 2].map(|()| pick(chance, &sizes));
    Buffers { receive, unsent, window, step, discards: false }
}

/// A run is wound down after so many turns of the server.
const MOST_TURNS: usize = 50_000;

/// Says how to repeat a run that fails.
struct Replay(String);

impl Drop for Replay {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("after {:?}; again with {}", os::time(), self.0);
        }
    }
}

/// One run, all of which follows from its seed. Returns how many people there were, how many were
/// removed as slow, and how many bytes were said.
fn random_run(seed: u64) -> [usize; 3] {
    let mut chance = Chance(seed.wrapping_mul(0xA076_1D64_78BD_642F) | 1);
    let plan = Plan::new(&mut chance);
    let _replay = Replay(format!("LINECHAT_SEED={seed}: {plan:?}"));
    let options = Options { max_clients: plan.max_clients, ..options() };
    let mut simulation = Simulation::new(seed, plan.conditions, options);
    for number in 0..plan.people {
        let after = plan.length * chance.below(200) as u32 / 1000;
        let behaviour = plan.behaviour(&mut chance, number);
        simulation.crowd.borrow_mut().expect(after, behaviour);
    }
    let end = os::time() + plan.length;
    os::set_alarm(Some(end));
    for turn in 0..MOST_TURNS {
        simulation.turn();
        if turn % 16 == 0 {
            simulation.check_books();
        }
        if os::time() >= end || os::calls().bytes > plan.most_bytes {
            break;
        }
    }
    simulation.wind_down();
    let crowd = simulation.crowd.borrow();
    let slow = crowd.history.people.iter().filter(|it| it.was_slow).count();
    [crowd.people.len(), slow, crowd.history.text.len()]
}

#[test]
fn random_people_are_served_as_promised() {
    let number = |name| std::env::var(name).ok().map(|it| it.parse::<u64>().expect(name));
    let (mut runs, mut totals) = (0, [0; 3]);
    let mut run = |seed| {
        runs += 1;
        totals.iter_mut().zip(random_run(seed)).for_each(|(total, it)| *total += it);
    };
    if let Some(seed) = number("LINECHAT_SEED") {
        run(seed);
    } else if let Some(limit) = number("LINECHAT_SIMULATE") {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).expect("a time after 1970");
        let begun = Instant::now();
        for seed in (since.as_nanos() as u64..).take_while(|_| begun.elapsed() < seconds(limit)) {
            run(seed);
        }
    } else {
        SEEDS.into_iter().chain(ONCE_FAILED).for_each(run);
    }
    let [people, slow, bytes] = totals;
    println!("{runs} runs, {people} people, {slow} removed as slow, {bytes} bytes said");
}
