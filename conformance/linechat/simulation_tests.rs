//! The whole server, unchanged, among random people in a simulated network (simulation.rs), and what
//! must hold whatever they do.
//!
//!     cargo test simulation                              always the same runs, and the scenarios
//!     LINECHAT_SIMULATE=60 cargo test --release random   other runs, for 60 seconds
//!     LINECHAT_SEED=123 cargo test --release random      the run that a failure names
//!
//! A run (`Simulation`) is a server and a `Crowd`. `Behaviour` says what each `Person` sends, how it
//! reads and how it ends. The first person, the observer p0, reads everything at once and says
//! nothing: what it receives is the history of the room (history.rs), which is checked against what
//! was asked for. Everybody else's stream must be the part of the history that history.rs says, and
//! between its lines the replies and private messages that this person is due, in order. At the end
//! everybody else leaves, and the server's books must be empty.
//!
//! Situations that are not left to chance are in scenarios.rs.

#[path = "history.rs"]
mod history;
#[path = "scenarios.rs"]
mod scenarios;

use super::os::{self, Buffers, Chance, Conditions, Peer};
use super::*;
use history::{History, Received};

const fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

/// All that has come to a peer.
fn take_text(peer: Peer) -> String {
    let mut bytes = Vec::new();
    peer.take(usize::MAX, &mut bytes);
    String::from_utf8(bytes).expect("UTF-8")
}

/// The roster as it must be; a unit test checks `put_roster` itself.
fn roster(room: &[String]) -> String {
    let mut lines = Vec::new();
    put_roster(&mut lines, room.len(), room.iter().map(String::as_str));
    String::from_utf8(lines).expect("UTF-8")
}

/// Takes a line, given without its ending, from the front of `lines`.
fn take_line(lines: &mut String, line: &str) {
    let rest = lines.strip_prefix(line).and_then(|rest| rest.strip_prefix("\r\n"));
    *lines = rest.unwrap_or_else(|| panic!("{line} instead of {lines}")).to_owned();
}

/// The events in the room so far.
#[derive(Default)]
struct Past {
    history: History,
    /// The names of all people, by number.
    names: Vec<String>,
    /// Private messages, by sender, receiver and number: how often one has been received, less how
    /// often it has been confirmed.
    whispers: BTreeMap<(usize, usize, usize), i32>,
}

impl Past {
    /// The names in the room, in the order of joining.
    fn room(&self) -> Vec<String> {
        self.room_at(self.history.text.len())
    }

    fn room_at(&self, position: usize) -> Vec<String> {
        let members = self.history.members.iter().filter(|it| it.1.is_here(position));
        let by_time: BTreeMap<_, _> = members.map(|(name, it)| (it.joined, name.clone())).collect();
        by_time.into_values().collect()
    }
}

// A person: what it sends, and what it must receive

/// `Any` is one of the others, or one that is refused.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Request {
    Nothing,
    Any,
    Msg { length: usize },
    Priv { to: usize, length: usize },
    List,
    Ping,
}

/// How a person reads: `step` bytes at once, then a pause, so that it is `rate` bytes a second.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Reading {
    rate: usize,
    step: usize,
}

impl Reading {
    const EAGER: Reading = Reading { rate: usize::MAX, step: 2 * 1024 * 1024 };
    const NEVER: Reading = Reading { rate: 0, step: 0 };

    fn pause(self) -> Duration {
        Duration::from_secs_f64(self.step as f64 / self.rate as f64)
    }
}

/// How a person's connection ends.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Ending {
    Quit,
    HalfClose,
    Close,
    Reset,
}

#[derive(Clone, Copy, Debug)]
struct Behaviour {
    request: Request,
    /// The time between two requests, or if the person floods, between two bursts, which are as many
    /// requests as the connection takes.
    pause: Duration,
    floods: bool,
    reading: Reading,
    buffers: Buffers,
    has_long_name: bool,
    /// The connection ends after this time, in this way; `None`: it does not. `comes_again`: another
    /// one follows at once, with a new name.
    ending: Option<(Duration, Ending)>,
    comes_again: bool,
    /// Every request is answered, and every message passed on, within this.
    max_delay: Option<Duration>,
}

impl Default for Behaviour {
    fn default() -> Self {
        Behaviour {
            request: Request::Nothing,
            pause: seconds(1_000_000),
            floods: false,
            reading: Reading::EAGER,
            buffers: Buffers::default(),
            has_long_name: false,
            ending: None,
            comes_again: false,
            max_delay: None,
        }
    }
}

impl Behaviour {
    /// Returns true if PROTOCOL.md promises that such a client is never disconnected.
    fn is_promised_to_stay(&self) -> bool {
        self.reading.rate >= 64 * 1024 && self.reading.step <= 2 * 1024 * 1024
    }
}

/// What the server must answer next.
#[derive(Debug)]
struct Reply {
    /// The line, or if this ends with a space, its beginning. A private message is refused if its
    /// receiver is away; the number of members is added to WELCOME.
    line: String,
    /// Asked for after this many own messages, at this time.
    said: usize,
    since: Duration,
}

#[derive(Default)]
struct Person {
    id: usize,
    peer: Peer,
    behaviour: Behaviour,
    /// Taken and not yet checked.
    unchecked: Vec<u8>,
    received: Received,
    expected: VecDeque<Reply>,
    answered: usize,
    /// Answers to LIST that have not come, and what has not come of the present one. They are not
    /// told apart from the same roster pushed to everybody, so they have no order.
    lists: usize,
    list: String,
    /// Messages that the observer has not received, and when they were sent.
    sending: VecDeque<(String, Duration)>,
    said: usize,
    /// The number of requests.
    sent: usize,
    /// The reason that LEFT must give, unless it is `slow`: this person has ended its connection.
    reason: Option<&'static str>,
    /// Reads nothing any longer.
    is_gone: bool,
    /// Has received all.
    has_all: bool,
    /// Bytes that the person can still take before its next pause. In a pause: 0.
    credit: usize,
    /// The number of the last private message from each sender.
    whispers: BTreeMap<usize, usize>,
}

impl Person {
    fn name(&self) -> &str {
        &self.received.name
    }

    fn is_open(&self) -> bool {
        self.reason.is_none() && !self.is_gone
    }

    fn send(&mut self, line: &str) {
        self.sent += 1;
        self.peer.send(format!("{line}\n"));
    }

    fn expect(&mut self, line: impl Into<String>) {
        self.expected.push_back(Reply { line: line.into(), said: self.said, since: os::time() });
    }

    /// Sends a request that has one line as its answer; see `Reply::line`.
    fn ask(&mut self, request: &str, answer: impl Into<String>) {
        self.send(request);
        self.expect(answer);
    }

    /// Checks what has been received, as far as lines are complete.
    fn check(&mut self, past: &mut Past) {
        for line in mem::take(&mut self.unchecked).split_inclusive(|&byte| byte == b'\n') {
            if !line.ends_with(b"\n") {
                self.unchecked = line.to_vec();
            } else if self.received.next(&past.history).starts_with(line) {
                self.received.advance(line.len());
            } else {
                let line = std::str::from_utf8(line).expect("UTF-8");
                self.check_own(line.strip_suffix("\r\n").expect("CRLF"), past);
            }
        }
    }

    /// A line that is not in the history: the next reply, or a private message.
    fn check_own(&mut self, line: &str, past: &mut Past) {
        let position = self.received.position.unwrap_or_default();
        if self.list.is_empty() && line.starts_with("USERS ") {
            self.lists = self.lists.checked_sub(1).expect("LIST");
            self.list = roster(&past.room_at(position));
        }
        if !self.list.is_empty() {
            return take_line(&mut self.list, line);
        }
        let words: Vec<&str> = line.split(' ').collect();
        if words[0] == "PRIV" {
            return self.whisper(&words, past);
        }
        let next = self.expected.pop_front();
        let next = next.unwrap_or_else(|| panic!("{} has asked for nothing: {line}", self.name()));
        let due = match next.line.split(' ').collect::<Vec<_>>()[..] {
            ["SENT", to, ..] if !past.history.is_here(to, position) => "ERR no-such-user ".into(),
            ["WELCOME", ..] => format!("{} {}", next.line, past.room_at(position).len()),
            _ => next.line,
        };
        assert!(line == due || due.ends_with(' ') && line.starts_with(&due), "{due}: {line}");
        // All comes before that was caused before the request.
        assert!(self.received.own >= next.said, "{}'s messages come later", self.name());
        self.was_in_time(next.since);
        self.answered += 1;
        if words[0] == "SENT" {
            let number = words[2].parse().expect("a number");
            *past.whispers.entry((self.id, id_of(words[1]), number)).or_default() -= 1;
        }
    }

    /// A private message has come. Its text is its number, how many messages for everybody its sender
    /// had sent before, and its receiver.
    fn whisper(&mut self, words: &[&str], past: &mut Past) {
        let from = id_of(words[1]);
        let [number, said, to] = [2, 3, 4].map(|at| words[at].parse::<usize>().expect("a number"));
        assert_eq!(to, self.id, "a message for somebody else");
        let last = self.whispers.insert(from, number);
        assert!(last < Some(number), "out of order: {words:?}");
        *past.whispers.entry((from, to, number)).or_default() += 1;
        // It stands at its place among what its sender said to everybody.
        let (messages, position) = (&past.history.members[words[1]].said, self.received.position);
        let before = messages.partition_point(|it| Some(it.start) < position);
        assert!(from == self.id || before == said, "not at its place: {words:?}");
    }

    fn was_in_time(&self, since: Duration) {
        if let Some(max_delay) = self.behaviour.max_delay {
            let delay = os::time() - since;
            assert!(delay <= max_delay, "p{} waited {delay:?} for an answer", self.id);
        }
    }

    /// The connection is over: the stream has ended or was reset.
    fn check_end(&mut self, past: &Past) {
        let is_promised = self.behaviour.is_promised_to_stay();
        assert!(!self.is_open() || !is_promised, "{} is cut off", self.name());
        // A client that takes the rest too slowly is dropped after a while.
        if !self.is_open() && self.behaviour.reading == Reading::EAGER {
            let is_whole = self.unchecked.is_empty() && !self.peer.was_reset();
            assert!(is_whole, "{} does not get everything", self.name());
            assert!(!past.room().contains(&self.received.name), "{} has not left", self.name());
            self.check_all(past);
        }
    }

    /// All requests are answered, and all is received.
    fn check_all(&mut self, past: &Past) {
        let is_answered = self.expected.is_empty() && self.list.is_empty() && self.lists == 0;
        assert!(is_answered, "{}: {:?} is not answered", self.name(), self.expected);
        let missing = self.received.next(&past.history).len();
        assert_eq!(missing, 0, "bytes that {} does not receive", self.name());
        self.has_all = true;
    }
}

/// Names are `p`, a number, and sometimes a tail that makes them long.
fn id_of(name: &str) -> usize {
    let digits = name[1..].split('-').next().unwrap_or_default();
    digits.parse().unwrap_or_else(|_| panic!("no person is named {name}"))
}

// The crowd: all people, and when they act

enum Event {
    Come(Behaviour),
    Act(usize),
    End(usize, Ending),
    /// A person's pause in reading is over.
    Read(usize),
}

#[derive(Default)]
struct Crowd {
    chance: Chance,
    past: Past,
    people: Vec<Person>,
    /// By time, and in the order in which they were scheduled.
    events: BTreeMap<(Duration, usize), Event>,
    scheduled: usize,
    /// The part of the last roster that the observer has not received.
    roster: String,
    /// For each turn since people last read: the budget applied before it. Their next lines can be
    /// from any of these turns.
    applied: Vec<bool>,
    /// No requests are sent any longer.
    is_over: bool,
}

impl Crowd {
    fn schedule(&mut self, after: Duration, event: Event) {
        self.scheduled += 1;
        self.events.insert((os::time() + after, self.scheduled), event);
    }

    /// Carries out the events whose time has come. Returns the time of the next one.
    fn act(&mut self) -> Option<Duration> {
        loop {
            let next = self.events.first_entry()?;
            let time = next.key().0;
            if time > os::time() {
                return Some(time);
            }
            match next.remove() {
                Event::Come(_) if self.is_over => {}
                Event::Come(behaviour) => _ = self.add(behaviour),
                Event::Act(id) | Event::End(id, _)
                    if self.is_over || !self.people[id].is_open() => {}
                Event::Act(id) => self.act_as(id),
                Event::End(id, ending) => self.end(id, ending),
                Event::Read(id) => {
                    self.people[id].credit = self.people[id].behaviour.reading.step;
                    self.read(id);
                }
            }
        }
    }

    /// Connects a person, which then acts.
    fn add(&mut self, behaviour: Behaviour) -> usize {
        let id = self.people.len();
        let name = match behaviour.has_long_name {
            true => format!("{:x<50}", format!("p{id}-")),
            false => format!("p{id}"),
        };
        let address = [10, 0, (id >> 8) as u8, id as u8];
        let peer = Peer::connect((address, 1024).into(), behaviour.buffers);
        let received = Received::new(&name);
        let mut person = Person { id, peer, behaviour, received, ..Person::default() };
        person.expect("HELLO linechat/1 ");
        // Not the observer, which is told only what happens in the room.
        if id > 0 && self.chance.below(5) == 0 {
            person.ask("NAME P0", "ERR name-taken ");
        }
        person.ask(&format!("NAME {name}"), format!("WELCOME {name}"));
        self.people.push(person);
        self.past.names.push(name);
        self.schedule(Duration::ZERO, Event::Act(id));
        if let Some((after, ending)) = behaviour.ending {
            self.schedule(after, Event::End(id, ending));
        }
        if behaviour.reading != Reading::NEVER {
            let phase = self.chance.below(1000) as u32;
            self.schedule(behaviour.reading.pause() * phase / 1000, Event::Read(id));
        }
        id
    }

    fn act_as(&mut self, id: usize) {
        let Person { peer, behaviour, .. } = self.people[id];
        let Behaviour { request, pause, floods, .. } = behaviour;
        while peer.unread() < 8 * 1024 && !peer.is_dropped() {
            self.request(id, request);
            if !floods {
                break;
            }
        }
        let share = if floods { 1000 } else { 500 + self.chance.below(1000) as u32 };
        self.schedule(pause * share / 1000, Event::Act(id));
    }

    fn request(&mut self, id: usize, request: Request) {
        let others = self.people.len() - 1;
        let person = &mut self.people[id];
        match request {
            Request::Nothing => {}
            Request::Any => {
                let to = 1 + self.chance.below(others);
                let length = self.chance.below(60);
                match self.chance.below(20) {
                    0..=8 => self.request(id, Request::Msg { length }),
                    9..=13 => self.request(id, Request::Priv { to, length }),
                    14..=15 => self.request(id, Request::Ping),
                    16 => self.request(id, Request::List),
                    _ => person.ask("nonsense", "ERR unknown-command "),
                }
            }
            Request::Msg { length } => {
                person.said += 1;
                let text = format!("{} {}", person.said, "x".repeat(length));
                person.send(&format!("MSG {text}"));
                person.sending.push_back((text, os::time()));
            }
            Request::Priv { to, length } => {
                let to = to.min(others);
                let name = &self.past.names[to];
                let text = format!("{} {} {to} {}", person.sent, person.said, "x".repeat(length));
                person.ask(&format!("PRIV @{name} {text}"), format!("SENT {name} {text}"));
            }
            Request::List => {
                person.send("LIST");
                person.lists += 1;
            }
            Request::Ping => {
                let token = person.sent;
                person.ask(&format!("PING {token}"), format!("PONG {token}"));
            }
        }
    }

    fn end(&mut self, id: usize, ending: Ending) {
        let person = &mut self.people[id];
        person.reason = Some("disconnected");
        if ending == Ending::Quit {
            person.reason = Some("quit");
            return person.ask("QUIT", "BYE ");
        }
        person.peer.send("MSG unfinish");
        match ending {
            Ending::Quit | Ending::HalfClose => return person.peer.half_close(),
            Ending::Close => person.peer.close(),
            Ending::Reset => person.peer.reset(),
        }
        self.stop_reading(id);
    }

    /// This person reads nothing any longer.
    fn stop_reading(&mut self, id: usize) {
        let Person { is_gone, behaviour, .. } = &mut self.people[id];
        *is_gone = true;
        if behaviour.comes_again {
            let next = Event::Come(*behaviour);
            self.schedule(Duration::from_micros(100), next);
        }
    }

    /// Takes what there is, as far as this person reads, and checks it.
    fn read(&mut self, id: usize) {
        let person = &mut self.people[id];
        if person.is_gone {
            return;
        }
        let taken = person.peer.take(person.credit, &mut person.unchecked);
        person.credit -= taken;
        person.check(&mut self.past);
        if taken > 0 && person.credit == 0 {
            let pause = person.behaviour.reading.pause();
            return self.schedule(pause, Event::Read(id));
        }
        if person.peer.sees_end() || person.peer.was_reset() {
            person.check_end(&self.past);
            // Otherwise the server closes, after a while.
            if self.chance.below(20) > 0 {
                person.peer.close();
            }
            self.stop_reading(id);
        }
    }

    /// After a turn of the server: everybody reads what has come, the observer first.
    fn read_all(&mut self) {
        if let Some(observer) = self.people.first() {
            take_text(observer.peer).lines().for_each(|line| self.observe(line));
        }
        (1..self.people.len()).for_each(|id| self.read(id));
        self.applied.clear();
    }

    /// The observer has received a line.
    fn observe(&mut self, line: &str) {
        let words: Vec<&str> = line.splitn(3, ' ').collect();
        if words[0] != "USERS" && !self.roster.is_empty() {
            let is_whole = self.roster == roster(&self.past.room());
            let may_come_later = is_whole && self.applied.contains(&true);
            assert!(may_come_later, "{line} instead of a roster");
        }
        match words[..] {
            ["HELLO", ..] => {}
            ["WELCOME", "p0", "1"] => self.observe("JOINED p0 1"),
            ["USERS", ..] => {
                take_line(&mut self.roster, line);
                assert!(self.applied.contains(&false), "a roster while the budget applies");
                self.past.history.push(line);
            }
            ["JOINED", ..] => self.change_room(line),
            ["LEFT", name, rest] => {
                let Person { reason, sending, .. } = &self.people[id_of(name)];
                let may_leave = match rest.split(' ').nth(1) {
                    Some("slow") => self.applied.contains(&true),
                    given => given == *reason && sending.is_empty(),
                };
                assert!(may_leave, "{line}: {reason:?}, not carried out: {sending:?}");
                self.change_room(line);
            }
            ["MSG", name, text] => {
                let person = &mut self.people[id_of(name)];
                let (said, since) = person.sending.pop_front().expect("something that was said");
                assert_eq!(text, said, "the next line of {name}");
                person.was_in_time(since);
                self.past.history.push(line);
            }
            _ => panic!("the observer receives: {line}"),
        }
    }

    /// A person has joined or left.
    fn change_room(&mut self, line: &str) {
        self.past.history.push(line);
        let room = self.past.room();
        assert_eq!(line.split(' ').nth(2), Some(&*room.len().to_string()), "{line}");
        self.roster = if room.len() <= 100 { roster(&room) } else { String::new() };
    }
}

/// Bytes that one client's pending output can grow by in one turn.
const MOST_IN_A_TURN: usize = 256 * 1024;

// The simulation: a server, and a crowd

struct Simulation {
    server: Server,
    texts: Receiver<String>,
    /// The lines that the console has shown.
    console: String,
    crowd: Crowd,
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

impl Simulation {
    /// A server to which nobody is connected.
    fn new(seed: u64, conditions: Conditions, options: Options) -> Self {
        let (listener, signals) = os::begin(seed, conditions);
        let (console, texts) = Console::new();
        let server = Server::new(options, listener, signals, console).expect("a server");
        let chance = Chance(seed.wrapping_mul(0xD134_2543_DE82_EF95) | 1);
        let crowd = Crowd { chance, ..Crowd::default() };
        Simulation { server, texts, console: String::new(), crowd }
    }

    /// Adds the observer.
    fn observed(mut self) -> Self {
        let buffers = Buffers::UNLIMITED;
        self.crowd.add(Behaviour { buffers, ..Behaviour::default() });
        self.run(Duration::from_millis(1));
        self
    }

    /// One turn of the server, unless it would wait for something that `end` or the crowd's next
    /// event comes before.
    fn turn_before(&mut self, end: Option<Duration>) {
        let next = self.crowd.act();
        os::with(|network| network.alarm = [next, end].into_iter().flatten().min());
        self.crowd.applied.push(self.is_limited());
        match self.server.turn() {
            Ok(()) => {}
            Err(error) => assert_eq!(error.kind(), ErrorKind::TimedOut, "{error}"),
        }
        self.console.extend(self.texts.try_iter());
        self.server.console.pending.store(0, Ordering::Relaxed);
        // A line that is logged after the writing comes to everybody in the next turn.
        if self.is_written() {
            self.crowd.read_all();
        }
    }

    fn turn(&mut self) {
        self.turn_before(None);
    }

    fn run_until(&mut self, end: Duration) {
        while os::time() < end && !self.server.has_stopped() {
            self.turn_before(Some(end));
        }
    }

    fn run(&mut self, time: Duration) {
        self.run_until(os::time() + time);
        assert!(os::calls().bytes < 1 << 32, "a flood goes on without limit");
    }

    /// Everything in the log has been written to everybody, as far as they take it.
    fn is_written(&self) -> bool {
        self.server.written == self.server.room.log.end()
    }

    fn is_limited(&self) -> bool {
        self.server.room.budget.applies()
    }

    // The end of a run

    /// No requests are sent any longer, and people that are not promised to stay end. The others must
    /// receive all that they are due. Then everybody except the observer leaves, and nothing remains.
    fn wind_down(&mut self) {
        self.crowd.is_over = true;
        let everybody = 0..self.crowd.people.len();
        for id in everybody.clone() {
            let person = &self.crowd.people[id];
            if person.behaviour.is_promised_to_stay() {
                continue;
            } else if person.is_open() {
                self.crowd.end(id, Ending::Reset);
            } else if !person.is_gone {
                // Its QUIT may wait until it reads its replies, which it never does.
                person.peer.reset();
                self.crowd.stop_reading(id);
            }
        }
        self.run(seconds(300));
        for id in everybody.skip(1) {
            let person = &mut self.crowd.people[id];
            if person.is_open() {
                person.check_all(&self.crowd.past);
                self.crowd.end(id, Ending::Quit);
            }
        }
        self.run(seconds(200));
        self.check_books();
        let crowd = &self.crowd;
        assert_eq!(crowd.past.room(), ["p0"], "still in the room");
        assert_eq!(crowd.roster, "", "a roster is owed");
        for (&(from, to, number), &balance) in &crowd.past.whispers {
            // Below 0: confirmed and not received. Above: received and not confirmed.
            let id = if balance < 0 { to } else { from };
            let is_missed = balance != 0 && crowd.people[id].has_all;
            assert!(!is_missed, "p{id} does not hear of number {number} from p{from} to p{to}");
        }
        let Room { clients, log, .. } = &self.server.room;
        assert_eq!((clients.count(), log.bytes.len()), (1, 0));
    }

    /// What must be true of the server's books after every turn.
    fn check_books(&self) {
        let Server { room, ip_groups, to_serve, next_deadline, .. } = &self.server;
        let Room { clients, members, by_name, log, budget, .. } = room;
        let count = |is: fn(&Client) -> bool| clients.iter().filter(|it| is(it.1)).count();
        let named = count(|it| it.name.is_some());
        assert_eq!(ip_groups.values().sum::<usize>(), clients.count());
        assert_eq!(os::with(|network| network.descriptors), clients.count());
        assert_eq!((members.len(), by_name.len(), room.names().count()), (named, named, named));
        assert_eq!(budget.queue.waiting.len(), count(|it| it.waiting_request.is_some()));
        assert!(budget.queue.finishes.keys().all(|&id| clients.get(id).is_some()));
        assert!(to_serve.waiting.keys().all(|key| clients.get(key.1).is_some()));
        assert_eq!(room.own_bytes, clients.iter().map(|it| it.1.outbox.own_bytes).sum::<usize>());
        // Lines that are logged after the writing count from the next turn on.
        let is_written = self.is_written() && room.writes.is_empty();
        let over = clients.iter().filter(|it| it.1.outbox.pending(log) > SOFT_LIMIT);
        let is_kept = budget.over_soft_limit.iter().copied().eq(over.map(|it| it.0));
        assert!(is_kept || !is_written, "over the soft limit: {:?}", budget.over_soft_limit);
        for (id, client) in clients.iter() {
            let Client { name, outbox, deadline, unprocessed, decoder, state, .. } = client;
            let pending = outbox.pending(log);
            assert!(name.as_ref().is_none_or(|name| by_name[&*name_key(name)] == id));
            assert!(pending <= HARD_LIMIT + MOST_IN_A_TURN, "{pending} bytes are pending");
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
        let cursors = clients.iter().filter_map(|it| it.1.outbox.cursor(log));
        let slowest = cursors.min().unwrap_or(log.end());
        assert!(slowest >= log.start, "the log lacks {} bytes", log.start - slowest);
        let needed = (log.end() - slowest) as usize;
        let is_trimmed = log.bytes.len() <= 2 * needed + 64 * 1024;
        assert!(is_trimmed || room.may_trim, "a log of {} bytes for {needed}", log.bytes.len());
    }
}

// Runs by chance

fn pick<T: Copy>(chance: &mut Chance, from: &[T]) -> T {
    from[chance.below(from.len())]
}

/// One run, all of which follows from its seed. Returns the number of people, of those removed as
/// slow, and of the bytes said.
fn random_run(seed: u64) -> [usize; 3] {
    let chance = &mut Chance(seed.wrapping_mul(0xA076_1D64_78BD_642F) | 1);
    let conditions = Conditions {
        partial: pick(chance, &[0, 0, 10, 50]),
        call_cost: Duration::from_nanos(pick(chance, &[0, 3500])),
        kib_cost: Duration::from_nanos(300),
    };
    let mut sim = Simulation::new(seed, conditions, options()).observed();
    let people = pick(chance, &[3, 5, 5, 10, 10, 20, 50, 120, 250]);
    let rates = [0, 0, 0, 500, 5000, 12_000, 40_000, 65_536, 65_536, 70_000, 300_000];
    let steps = [100, 1500, 65_536, 700_000, 2 * 1024 * 1024];
    let sizes = [100, 1500, 4096, 65_536, 65_536, 1024 * 1024];
    // Percentages of the people that flood, that read slowly or never, and that come and go.
    let [flooders, slow, restless] =
        [[0, 5, 30, 30], [0, 20, 50, 50], [0, 0, 5, 50]].map(|some| pick(chance, &some));
    // About how long a person pauses between two requests.
    let pauses = [10, 100, 1000, 10_000, 600_000, 6_000_000];
    let usual_pause = Duration::from_millis(pick(chance, &pauses));
    let length = usual_pause * 100 + seconds(300);
    for _ in 0..people {
        let mut is = |percent: usize| chance.below(100) < percent;
        let (floods, is_slow, is_restless) = (is(flooders), is(slow), is(restless));
        let msg = Request::Msg { length: pick(chance, &[0, 0, 50, 3000]) };
        let whisper = Request::Priv { to: 1 + chance.below(people), length: 0 };
        let other = pick(chance, &[whisper, Request::List, Request::Ping]);
        let floods_of = [msg, msg, other, Request::Any];
        let request = if floods { pick(chance, &floods_of) } else { Request::Any };
        let pause = match floods {
            true => Duration::from_millis(pick(chance, &[1, 100, 1000])),
            false => usual_pause * (100 + chance.below(1900) as u32) / 1000,
        };
        let (rate, window) = (pick(chance, &rates), pick(chance, &sizes));
        let reading = Reading { rate, step: pick(chance, &steps).min(rate * 50) };
        let most = 2 * length / if is_restless { 50 } else { 1 };
        let end = Duration::from_millis(chance.below(most.as_millis() as usize) as u64);
        let endings = [Ending::Quit, Ending::HalfClose, Ending::Close, Ending::Reset];
        let behaviour = Behaviour {
            request,
            pause,
            floods,
            reading: if is_slow { reading } else { Reading::EAGER },
            buffers: Buffers {
                unsent: pick(chance, &sizes),
                window,
                step: (window / pick(chance, &[2, 16, 1000])).max(1),
                discards: false,
            },
            has_long_name: chance.below(4) == 0,
            ending: Some((end, pick(chance, &endings))),
            comes_again: is_restless || chance.below(2) == 0,
            max_delay: None,
        };
        let after = length * chance.below(200) as u32 / 1000;
        sim.crowd.schedule(after, Event::Come(behaviour));
    }
    let (end, most_bytes) = (os::time() + length, pick(chance, &[4, 16, 64]) << 20);
    for turn in 0..50_000 {
        sim.turn_before(Some(end));
        if turn % 4 == 0 {
            sim.check_books();
        }
        if os::time() >= end || os::calls().bytes > most_bytes {
            break;
        }
    }
    sim.wind_down();
    let slow = sim.console.matches("left (slow)").count();
    [sim.crowd.people.len(), slow, sim.crowd.past.history.text.len()]
}

#[test]
fn random_people_are_served_as_promised() {
    let number = |name| std::env::var(name).ok().map(|it| it.parse::<u64>().expect(name));
    let since = SystemTime::now().duration_since(UNIX_EPOCH).expect("a time after 1970");
    let limit = number("LINECHAT_SIMULATE").map_or(Duration::MAX, seconds);
    let seeds = match number("LINECHAT_SEED") {
        Some(seed) => seed..seed + 1,
        None if limit < Duration::MAX => since.as_nanos() as u64..u64::MAX,
        // In one of these runs a client is removed as slow.
        None => 5..30,
    };
    let begun = Instant::now();
    let (mut runs, mut totals) = (0, [0; 3]);
    for seed in seeds.take_while(|_| begun.elapsed() < limit) {
        let run = std::panic::catch_unwind(|| random_run(seed));
        let Ok(run) = run else { panic!("after {:?}; LINECHAT_SEED={seed}", os::time()) };
        runs += 1;
        totals.iter_mut().zip(run).for_each(|(total, it)| *total += it);
    }
    let [people, slow, bytes] = totals;
    println!("{runs} runs, {people} people, {slow} removed as slow, {bytes} bytes said");
}
