//! linechat-server: one chat room for everybody who can send a line of text.
//!
//! Try it:
//!
//!     cargo run --release --bin linechat-server     (or: make run-server)
//!     telnet localhost 9999                         (in two more windows)
//!     NAME ana
//!     MSG hello, everyone
//!
//! PROTOCOL.md says what goes over the wire; `--help` lists the options. This file is one thread
//! around one event loop, in layers, each knowing nothing of those below it:
//!
//! 1. the wire: bytes into lines, lines into requests, replies into lines;
//! 2. the room: who is here, and what each request does;
//! 3. the connections and the loop: sockets, readiness, time-outs, slow readers;
//! 4. the console: what the person running the server sees;
//! 5. the command line;
//! 6. the operating system: the few calls that std lacks, and the only `unsafe`.
//!
//! A turn of the loop is: wait until something is ready, read it, apply every complete line to the
//! room, then write to each person once, however many lines they are owed.
//!
//! What it does not do: passwords, encryption, several rooms, history.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::fmt;
use std::fs::File;
use std::io::{self, ErrorKind, IoSlice, Read, Write};
use std::mem;
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::process::ExitCode;
use std::rc::Rc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

// ---------------------------------------------------------------------------------------------
// The limits (PROTOCOL.md, "Limits")
// ---------------------------------------------------------------------------------------------

/// Bytes of a request before its line ending, counted as received.
const MAX_REQUEST: usize = 4000;
/// Bytes of a line to a client, CRLF included.
const MAX_LINE: usize = 4096;
/// Bytes of a name.
const MAX_NAME: usize = 50;
/// Up to this many people the whole roster is pushed to everybody after each join and leave.
const MAX_PUSHED_ROSTER: usize = 100;
/// Undelivered bytes beyond which a client is removed as slow.
const MAX_BACKLOG: usize = 1024 * 1024;
/// Undelivered bytes beyond which a client is behind: everybody's requests are then read at
/// `PACE`, so that a flood does not push the client over `MAX_BACKLOG`.
const BEHIND: usize = 256 * 1024;
/// While somebody is behind, each connection is read at this many bytes a `PACE_WINDOW`: 64 KiB/s.
const PACE: usize = 16 * 1024;
const PACE_WINDOW: Duration = Duration::from_millis(250);
/// Undelivered bytes of replies to a client beyond which its further requests wait.
const MAX_WAITING_REPLIES: usize = 64 * 1024;
/// How long one who is behind, or whose connection is closing, may go without taking a byte.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long a connection may go without a name (`--name-timeout`).
const NAME_TIMEOUT: Duration = Duration::from_secs(60);
/// How long the last lines may take to be delivered when the server stops.
const STOP_TIMEOUT: Duration = Duration::from_secs(1);
/// How long to leave the listener alone after an accept failed for lack of memory or descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(250);
/// How long to wait before lines are shown again that the console did not take.
const CONSOLE_PAUSE: Duration = Duration::from_millis(100);
/// Bytes read from one connection in one turn, so that nobody's flood keeps others waiting.
const READ_SHARE: usize = 64 * 1024;
/// Connections accepted in one turn.
const ACCEPT_SHARE: usize = 512;
/// Connections that the kernel holds ready to be accepted. A turn in a large room takes a while,
/// and whoever then finds no place tries again only after a second (tcp(7), tcp_syn_retries).
const ACCEPT_QUEUE: i32 = 4096;
/// Bytes for everybody after which a turn ends early: a socket should be able to take a turn's
/// lines, else many people speaking at once would make a healthy reader look slow.
const MAX_TURN: usize = 256 * 1024;
/// Bytes put into single outboxes after which a turn ends early, which bounds their memory.
const MAX_TURN_COPIES: usize = 1024 * 1024;
/// Descriptors that are not for clients: the standard three, the poller, the listener, the reserve
/// one, and some for connections that are being closed.
const RESERVED_DESCRIPTORS: usize = 32;

// ---------------------------------------------------------------------------------------------
// 1. The wire: bytes into lines, lines into requests, replies into lines
// ---------------------------------------------------------------------------------------------

const BACKSPACE: u8 = 0x08;
const DELETE: u8 = 0x7f;
/// What does not simply belong to a line of text.
const SPECIAL: [u8; 4] = [b'\n', BACKSPACE, DELETE, telnet::COMMAND];

/// Telnet command bytes (RFC 854).
mod telnet {
    pub const SUBNEGOTIATION_END: u8 = 240;
    pub const SUBNEGOTIATION: u8 = 250;
    pub const WILL: u8 = 251;
    pub const WONT: u8 = 252;
    pub const DO: u8 = 253;
    pub const DONT: u8 = 254;
    pub const COMMAND: u8 = 255;
}

/// Where a connection's bytes stand in the telnet protocol (PROTOCOL.md, "Telnet").
#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Telnet {
    #[default]
    Text,
    Command,
    /// The next byte names an option; with an answer, the client is to be told it.
    Option(Option<u8>),
    Subnegotiation,
    SubnegotiationCommand,
}

/// Finds the lines in what one connection sends, however the network cuts it into pieces
/// (PROTOCOL.md, "Framing" and "Telnet").
#[derive(Default)]
struct Decoder {
    /// The current line so far, without telnet commands and erased characters.
    line: Vec<u8>,
    /// How many bytes of the current line have been received.
    received: u16,
    telnet: Telnet,
    /// The rest of the current line is thrown away, because it is too long.
    skipping: bool,
    /// `line` has been handed out and is to be cleared.
    handed_out: bool,
}

/// What the decoder found.
#[derive(Debug, PartialEq, Eq)]
enum Decoded<'a> {
    /// A whole line, without its ending; never an empty one.
    Line(&'a [u8]),
    /// The beginning of a line that has just passed `MAX_REQUEST`.
    TooLong(&'a [u8]),
    /// A telnet command that is due to the client.
    TelnetAnswer([u8; 3]),
}

impl Decoder {
    /// Takes bytes from the front of `input` until something is found or no byte is left.
    fn next(&mut self, input: &mut &[u8]) -> Option<Decoded<'_>> {
        if mem::take(&mut self.handed_out) {
            self.line.clear();
        }
        while let Some((&byte, rest)) = input.split_first() {
            let in_text = self.telnet == Telnet::Text;
            if in_text && !self.skipping {
                // Nearly everything is plain text, and is taken in runs.
                let room = MAX_REQUEST.saturating_sub(self.received.into()).min(input.len());
                let run = input.iter().take(room).position(|byte| SPECIAL.contains(byte));
                let (text, rest) = input.split_at(run.unwrap_or(room));
                if !text.is_empty() {
                    self.line.extend(text);
                    self.received += text.len() as u16;
                    *input = rest;
                    continue;
                }
            }
            let ends = in_text && byte == b'\n';
            if !ends && !self.skipping && self.has_no_room_for(byte, in_text) {
                self.skipping = true;
                self.handed_out = true;
                return Some(Decoded::TooLong(&self.line));
            }
            *input = rest;
            if ends {
                self.received = 0;
                if self.line.last() == Some(&b'\r') {
                    self.line.pop();
                }
                self.skipping = false;
                if !self.line.is_empty() {
                    self.handed_out = true;
                    return Some(Decoded::Line(&self.line));
                }
                continue;
            }
            self.received = self.received.saturating_add(1);
            self.telnet = match (self.telnet, byte) {
                (Telnet::Text, telnet::COMMAND) => Telnet::Command,
                (Telnet::Text, BACKSPACE | DELETE) => {
                    self.erase();
                    Telnet::Text
                }
                (Telnet::Text, _) | (Telnet::Command, telnet::COMMAND) => {
                    if !self.skipping {
                        self.line.push(byte);
                    }
                    Telnet::Text
                }
                (Telnet::Command, telnet::WILL) => Telnet::Option(Some(telnet::DONT)),
                (Telnet::Command, telnet::DO) => Telnet::Option(Some(telnet::WONT)),
                (Telnet::Command, telnet::WONT | telnet::DONT) => Telnet::Option(None),
                (Telnet::Command, telnet::SUBNEGOTIATION) => Telnet::Subnegotiation,
                (Telnet::Command, _) => Telnet::Text,
                (Telnet::Option(answer), option) => {
                    self.telnet = Telnet::Text;
                    match answer {
                        Some(answer) => {
                            return Some(Decoded::TelnetAnswer([telnet::COMMAND, answer, option]))
                        }
                        None => continue,
                    }
                }
                (Telnet::Subnegotiation, telnet::COMMAND) => Telnet::SubnegotiationCommand,
                (Telnet::SubnegotiationCommand, telnet::SUBNEGOTIATION_END) => Telnet::Text,
                (Telnet::Subnegotiation | Telnet::SubnegotiationCommand, _) => {
                    Telnet::Subnegotiation
                }
            };
        }
        None
    }

    /// Whether `byte` would make the line too long. A CR may be the start of the line's ending.
    fn has_no_room_for(&self, byte: u8, in_text: bool) -> bool {
        let received = usize::from(self.received);
        received > MAX_REQUEST || (received == MAX_REQUEST && !(in_text && byte == b'\r'))
    }

    /// Takes back the last character: a byte, and before it those that UTF-8 continues with it.
    fn erase(&mut self) {
        while let Some(byte) = self.line.pop() {
            if byte & 0b1100_0000 != 0b1000_0000 {
                break;
            }
        }
    }

    /// Whether nothing of a line is held, so that its buffer may serve another connection.
    fn is_between_lines(&self) -> bool {
        self.handed_out || self.line.is_empty()
    }
}

/// Why a request is refused (PROTOCOL.md, "Errors").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Refusal {
    Usage(&'static str),
    UnknownCommand,
    NotNamed,
    AlreadyNamed,
    BadName,
    NameTaken,
    NoSuchUser,
    BadText,
    LineTooLong,
    Full,
    Timeout,
}

impl Refusal {
    /// The code, which is for programs, and the text, which is for people.
    fn code_and_text(self) -> (&'static str, &'static str) {
        match self {
            Refusal::Usage(usage) => ("usage", usage),
            Refusal::UnknownCommand => ("unknown-command", "no such command; HELP lists them"),
            Refusal::NotNamed => ("not-named", "choose a name first: NAME <name>"),
            Refusal::AlreadyNamed => ("already-named", "you have a name, and it cannot be changed"),
            Refusal::BadName => (
                "bad-name",
                "a name has 1 to 50 bytes: letters, digits, _ - . and no spaces; \
                 the first is a letter or digit",
            ),
            Refusal::NameTaken => ("name-taken", "somebody here has that name; choose another"),
            Refusal::NoSuchUser => ("no-such-user", "nobody here has that name; LIST tells who is"),
            Refusal::BadText => (
                "bad-text",
                "lines are UTF-8 without control characters (TAB is fine) \
                 or characters that turn the writing direction",
            ),
            Refusal::LineTooLong => ("line-too-long", "a line has at most 4000 bytes"),
            Refusal::Full => ("full", "no more connections can be taken now; try again later"),
            Refusal::Timeout => ("timeout", "no name was given in time"),
        }
    }
}

/// A well-formed request, its texts as the client wrote them (PROTOCOL.md, "Requests").
#[derive(Debug, PartialEq, Eq)]
enum Request<'a> {
    Name(&'a str),
    Msg(&'a str),
    Priv { to: &'a str, text: &'a str },
    List,
    Ping(&'a str),
    Help,
    Quit,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Verb {
    Name,
    Msg,
    Priv,
    List,
    Ping,
    Help,
    Quit,
}

/// Every verb with the line that explains it, in HELP and where it is used wrongly.
const VERBS: [(&str, Verb, &str); 7] = [
    ("NAME", Verb::Name, "NAME <name> takes a name and enters the room"),
    ("MSG", Verb::Msg, "MSG <text> says something to everybody else"),
    ("PRIV", Verb::Priv, "PRIV @<name> <text> says something to one person alone"),
    ("LIST", Verb::List, "LIST tells who is here"),
    ("PING", Verb::Ping, "PING [token] is answered with PONG and the same token"),
    ("HELP", Verb::Help, "HELP shows these lines"),
    ("QUIT", Verb::Quit, "QUIT leaves"),
];

/// How an HTTP request begins; see `Room::request`.
const HTTP_METHODS: [&[u8]; 10] = [
    b"GET ",
    b"HEAD ",
    b"POST ",
    b"PUT ",
    b"PATCH ",
    b"DELETE ",
    b"OPTIONS ",
    b"TRACE ",
    b"CONNECT ",
    b"PRI ",
];

/// Understands a line, checked in the order that PROTOCOL.md gives under "Requests".
fn parse(line: &[u8], named: bool) -> Result<Request<'_>, Refusal> {
    let line = std::str::from_utf8(line).map_err(|_| Refusal::BadText)?;
    let is_plain = line.bytes().all(|byte| matches!(byte, b' '..=b'~'));
    if !is_plain && line.chars().any(is_forbidden) {
        return Err(Refusal::BadText);
    }
    let (word, argument) = line.split_once(' ').unwrap_or((line, ""));
    let &(_, verb, usage) = VERBS
        .iter()
        .find(|(name, ..)| name.eq_ignore_ascii_case(word))
        .ok_or(Refusal::UnknownCommand)?;
    match verb {
        Verb::Name if named => return Err(Refusal::AlreadyNamed),
        Verb::Msg | Verb::Priv | Verb::List if !named => return Err(Refusal::NotNamed),
        _ => {}
    }
    let no_argument = argument.bytes().all(|byte| byte == b' ');
    match verb {
        Verb::Name if !argument.is_empty() => Some(Request::Name(argument)),
        Verb::Msg if !argument.is_empty() => Some(Request::Msg(argument)),
        Verb::Priv => argument
            .strip_prefix('@')
            .and_then(|argument| argument.split_once(' '))
            .filter(|(to, text)| !to.is_empty() && !text.is_empty())
            .map(|(to, text)| Request::Priv { to, text }),
        Verb::List if no_argument => Some(Request::List),
        Verb::Ping => Some(Request::Ping(argument)),
        Verb::Help if no_argument => Some(Request::Help),
        Verb::Quit if no_argument => Some(Request::Quit),
        _ => None,
    }
    .ok_or(Refusal::Usage(usage))
}

/// Characters that could move somebody else's cursor, forge a line or reorder what is shown
/// (PROTOCOL.md, "Text").
fn is_forbidden(character: char) -> bool {
    match character {
        '\t' => false,
        '\u{2028}' | '\u{2029}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => true,
        _ => character.is_control(),
    }
}

fn is_good_name(name: &str) -> bool {
    let is_letter_or_digit = |c: char| c.is_alphabetic() || c.is_numeric();
    name.len() <= MAX_NAME
        && name.starts_with(is_letter_or_digit)
        && name.chars().all(|c| is_letter_or_digit(c) || matches!(c, '_' | '-' | '.'))
}

/// Appends one line to `out`: the words, a space between each two, CRLF.
fn put_line<'a>(out: &mut impl Extend<&'a u8>, words: &[&'a str]) {
    for (position, word) in words.iter().enumerate() {
        if position > 0 {
            out.extend(b" ");
        }
        out.extend(word.as_bytes());
    }
    out.extend(b"\r\n");
}

/// Appends one line to an outbox, which is mostly empty and grows just once for it.
fn put_own_line(outbox: &mut VecDeque<u8>, words: &[&str]) {
    outbox.reserve(words.iter().map(|word| word.len() + 1).sum::<usize>() + 1);
    put_line(outbox, words);
}

/// Appends the roster to `out`, on as many USERS lines as it takes (PROTOCOL.md, "Roster").
fn put_roster<'a>(out: &mut Vec<u8>, count: usize, names: impl Iterator<Item = &'a str>) {
    let head = format!("USERS {count}");
    let room = MAX_LINE - b"\r\n".len();
    let mut length = 0;
    for (position, name) in names.enumerate() {
        if position == 0 || length + 1 + name.len() > room {
            if position > 0 {
                out.extend(b"\r\n");
            }
            out.extend(head.as_bytes());
            length = head.len();
        }
        out.extend(b" ");
        out.extend(name.as_bytes());
        length += 1 + name.len();
    }
    out.extend(b"\r\n");
}

// ---------------------------------------------------------------------------------------------
// 2. The room: who is here, and what each request does
// ---------------------------------------------------------------------------------------------

/// A connection's place in the room's and in the loop's tables. Used again once it is free.
type Id = usize;

/// Everybody connected, with what they are owed.
///
/// A line for everybody is stored once, in `turn`; each person's mark says how far into it their
/// own outbox already reaches, so they are owed their outbox and then `turn[mark..]`. What must
/// reach one person at its own place among those lines first copies the lines before it into that
/// person's outbox. So a message costs the same whatever the size of the room, and only those who
/// do not keep up hold copies.
#[derive(Default)]
struct Room {
    peers: Vec<Option<Peer>>,
    /// Who has a name, by that name in lower case.
    by_name: HashMap<Box<str>, Id>,
    /// Who has a name, in the order of joining.
    by_arrival: BTreeMap<u64, Id>,
    arrivals: u64,
    /// The lines of this turn that are for everybody.
    turn: Vec<u8>,
    /// Bytes put into single outboxes in this turn.
    copies: usize,
    /// Whose outbox has grown in this turn.
    touched: Vec<Id>,
}

/// One connection as the room sees it.
#[derive(Default)]
struct Peer {
    outbox: VecDeque<u8>,
    /// How much of the outbox answers this peer's own requests, at the most.
    replies: usize,
    /// How much of `Room::turn` need not be sent from there.
    mark: usize,
    person: Option<Person>,
    has_spoken: bool,
    is_touched: bool,
}

struct Person {
    name: Rc<str>,
    arrival: u64,
}

/// How somebody left (PROTOCOL.md, "LEFT").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reason {
    Quit,
    Disconnected,
    Slow,
}

impl Reason {
    fn word(self) -> &'static str {
        match self {
            Reason::Quit => "quit",
            Reason::Disconnected => "disconnected",
            Reason::Slow => "slow",
        }
    }
}

/// What a line did that the loop or the console must know of.
#[derive(Debug, PartialEq, Eq)]
enum Outcome<'a> {
    Nothing,
    Joined,
    /// A public message, for `--verbose`.
    Said(&'a str),
    /// The connection is to be closed once its outbox is delivered. With a name: who left by QUIT.
    Ended(Option<Rc<str>>),
}

impl Room {
    fn peer(&mut self, id: Id) -> Option<&mut Peer> {
        self.peers.get_mut(id)?.as_mut()
    }

    fn name(&self, id: Id) -> Option<Rc<str>> {
        let person = self.peers.get(id)?.as_ref()?.person.as_ref()?;
        Some(person.name.clone())
    }

    /// How many people have a name.
    fn count(&self) -> usize {
        self.by_arrival.len()
    }

    /// A new connection, which is greeted.
    fn connect(&mut self, id: Id) {
        if self.peers.len() <= id {
            self.peers.resize_with(id + 1, || None);
        }
        if let Some(place) = self.peers.get_mut(id) {
            *place = Some(Peer::default());
        }
        self.tell(id, &["HELLO linechat/1 choose a name with NAME <name>; HELP shows the rest"]);
    }

    /// One line from a connection: whole, or the beginning of one that is too long.
    fn request<'a>(&mut self, id: Id, line: &'a [u8], is_whole: bool) -> Outcome<'a> {
        let Some(peer) = self.peer(id) else {
            return Outcome::Nothing;
        };
        let named = peer.person.is_some();
        // A web page can make a browser send a form of lines anywhere; it cannot hide that the
        // first of them is an HTTP request.
        let is_first = !mem::replace(&mut peer.has_spoken, true);
        if is_first && HTTP_METHODS.iter().any(|method| line.starts_with(method)) {
            self.refuse(id, Refusal::Usage("this is linechat, not a web server"));
            return Outcome::Ended(None);
        }
        let request = if is_whole { parse(line, named) } else { Err(Refusal::LineTooLong) };
        match request {
            Ok(Request::Name(name)) => match self.join(id, name) {
                Ok(()) => return Outcome::Joined,
                Err(refusal) => self.refuse(id, refusal),
            },
            Ok(Request::Msg(text)) => {
                if let Some(from) = self.name(id) {
                    self.tell_others(id, &["MSG", &from, text]);
                    return Outcome::Said(text);
                }
            }
            Ok(Request::Priv { to, text }) => self.whisper(id, to, text),
            Ok(Request::List) => {
                let mut lines = Vec::new();
                self.put_roster(&mut lines);
                self.reply(id, |outbox| outbox.extend(&lines));
            }
            Ok(Request::Ping("")) => self.tell(id, &["PONG"]),
            Ok(Request::Ping(token)) => self.tell(id, &["PONG", token]),
            Ok(Request::Help) => {
                for (.., help) in VERBS {
                    self.tell(id, &["HELP", help]);
                }
            }
            Ok(Request::Quit) => {
                self.tell(id, &["BYE see you"]);
                return Outcome::Ended(self.leave(id, Reason::Quit));
            }
            Err(refusal) => self.refuse(id, refusal),
        }
        Outcome::Nothing
    }

    fn join(&mut self, id: Id, name: &str) -> Result<(), Refusal> {
        if !is_good_name(name) {
            return Err(Refusal::BadName);
        }
        let key = name.to_lowercase().into_boxed_str();
        if self.by_name.contains_key(&key) {
            return Err(Refusal::NameTaken);
        }
        let arrival = self.arrivals;
        self.arrivals += 1;
        self.by_name.insert(key, id);
        self.by_arrival.insert(arrival, id);
        let mark = self.turn.len();
        if let Some(peer) = self.peer(id) {
            peer.person = Some(Person { name: name.into(), arrival });
            peer.mark = mark;
        }
        let count = self.count().to_string();
        self.tell(id, &["WELCOME", name, &count]);
        self.tell_others(id, &["JOINED", name, &count]);
        self.push_roster();
        Ok(())
    }

    fn whisper(&mut self, id: Id, to: &str, text: &str) {
        let recipient = self.by_name.get(to.to_lowercase().as_str()).copied();
        let recipient = recipient.and_then(|to| Some((to, self.name(to)?)));
        match (recipient, self.name(id)) {
            (Some((to, to_name)), Some(from)) => {
                self.put(to, |outbox| put_own_line(outbox, &["PRIV", &from, text]));
                self.tell(id, &["SENT", &to_name, text]);
            }
            _ => self.refuse(id, Refusal::NoSuchUser),
        }
    }

    /// Takes a person out of the room and says so to the others. Returns the name, if there was
    /// one; what the connection is owed stays in its outbox.
    fn leave(&mut self, id: Id, reason: Reason) -> Option<Rc<str>> {
        self.touch(id);
        let Person { name, arrival } = self.peer(id)?.person.take()?;
        self.by_name.remove(name.to_lowercase().as_str());
        self.by_arrival.remove(&arrival);
        let count = self.count().to_string();
        put_line(&mut self.turn, &["LEFT", &name, &count, reason.word()]);
        self.push_roster();
        Some(name)
    }

    /// Forgets a connection and what it was owed.
    fn forget(&mut self, id: Id) {
        if let Some(place) = self.peers.get_mut(id) {
            *place = None;
        }
    }

    fn refuse(&mut self, id: Id, refusal: Refusal) {
        let (code, text) = refusal.code_and_text();
        self.tell(id, &["ERR", code, text]);
    }

    /// A line that answers a connection's request.
    fn tell(&mut self, id: Id, words: &[&str]) {
        self.reply(id, |outbox| put_own_line(outbox, words));
    }

    /// Appends what answers a connection's request.
    fn reply(&mut self, id: Id, append: impl FnOnce(&mut VecDeque<u8>)) {
        let length = self.put(id, append);
        if let Some(peer) = self.peer(id) {
            peer.replies += length;
        }
    }

    /// Appends to one connection's outbox, behind what everybody was told before. Returns how much.
    fn put(&mut self, id: Id, append: impl FnOnce(&mut VecDeque<u8>)) -> usize {
        let Some(Some(peer)) = self.peers.get_mut(id) else {
            return 0;
        };
        let before = peer.outbox.len();
        if peer.person.is_some() {
            peer.outbox.extend(self.turn.get(peer.mark..).unwrap_or_default());
            peer.mark = self.turn.len();
        }
        let caught_up = peer.outbox.len();
        append(&mut peer.outbox);
        let length = peer.outbox.len() - caught_up;
        self.copies += peer.outbox.len() - before;
        if !mem::replace(&mut peer.is_touched, true) {
            self.touched.push(id);
        }
        length
    }

    /// Puts everything that everybody was told before into one connection's outbox, and has that
    /// be seen to at the end of the turn.
    fn touch(&mut self, id: Id) {
        self.put(id, |_| ());
    }

    /// A line for everybody in the room but one.
    fn tell_others(&mut self, id: Id, words: &[&str]) {
        self.touch(id);
        put_line(&mut self.turn, words);
        let mark = self.turn.len();
        if let Some(peer) = self.peer(id) {
            peer.mark = mark;
        }
    }

    /// The roster for everybody, unless the room is too large for that. An empty room has nobody
    /// to be told.
    fn push_roster(&mut self) {
        if (1..=MAX_PUSHED_ROSTER).contains(&self.count()) {
            let mut turn = mem::take(&mut self.turn);
            self.put_roster(&mut turn);
            self.turn = turn;
        }
    }

    fn put_roster(&self, out: &mut Vec<u8>) {
        let people = self.by_arrival.values().filter_map(|&id| self.peers.get(id)?.as_ref());
        let names = people.filter_map(|peer| Some(&*peer.person.as_ref()?.name));
        put_roster(out, self.count(), names);
    }

    /// What a connection is owed: its outbox, and behind it the part of the turn that is not in
    /// the outbox. The caller sends the one or keeps it in the other: both count as settled.
    fn owed(&mut self, id: Id) -> Option<(&mut VecDeque<u8>, &[u8])> {
        let peer = self.peers.get_mut(id)?.as_mut()?;
        let mark = mem::take(&mut peer.mark);
        peer.is_touched = false;
        peer.replies = peer.replies.min(peer.outbox.len());
        let fresh = match peer.person {
            Some(_) => self.turn.get(mark..).unwrap_or_default(),
            None => &[],
        };
        Some((&mut peer.outbox, fresh))
    }

    /// Whether so many replies wait for a connection that its further requests are to wait too.
    fn is_backed_up(&self, id: Id) -> bool {
        let peer = self.peers.get(id).and_then(Option::as_ref);
        peer.is_some_and(|peer| peer.replies.min(peer.outbox.len()) > MAX_WAITING_REPLIES)
    }

    /// Everything of this turn has been sent or kept in outboxes.
    fn end_turn(&mut self) {
        self.turn.clear();
        self.copies = 0;
    }

    fn turn_is_full(&self) -> bool {
        self.turn.len() >= MAX_TURN || self.copies >= MAX_TURN_COPIES
    }
}

// ---------------------------------------------------------------------------------------------
// 3. The connections and the loop
// ---------------------------------------------------------------------------------------------

/// The loop's side of a connection; the room's side is a `Peer`.
struct Connection {
    socket: TcpStream,
    address: SocketAddr,
    state: State,
    decoder: Decoder,
    /// Received, but to be looked at only once the client has taken its earlier replies.
    unread: Vec<u8>,
    /// When patience ends: with one who has no name, is behind, or is closing.
    deadline: Option<Instant>,
    interest: Interest,
    /// The socket takes nothing now; write again when it is ready.
    is_blocked: bool,
    is_behind: bool,
    /// Not read until the next `PACE_WINDOW`.
    is_paced: bool,
    /// The `PACE_WINDOW` in which it was last read while somebody was behind, and how much.
    window: u32,
    read_in_window: u32,
}

/// States of a connection (PROTOCOL.md, "States of a connection").
#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    /// Connected, or in the room.
    Open,
    /// What it is owed is being delivered; nothing that it sends counts any more.
    Closing { input_has_ended: bool },
    /// Everything is delivered and the stream ended on our side. Closing the socket now could
    /// reset the connection, and so destroy the last lines, if the peer still sends something
    /// (RFC 1122, section 4.2.2.13); so the peer's end is awaited.
    Finished,
    /// Failed, or given up; to be removed at the end of the turn. With a reason if it was open.
    Lost(Option<Reason>),
}

/// Which readiness the poller is asked to report.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Interest {
    read: bool,
    write: bool,
}

/// One socket's readiness. A failure counts as both of the others: the next call tells which.
struct Readiness {
    token: usize,
    readable: bool,
    writable: bool,
    failed: bool,
}

/// Tokens that are not a connection's.
const LISTENER: usize = usize::MAX;
const STOP_SIGNAL: usize = usize::MAX - 1;

struct Server {
    options: Options,
    poller: os::Poller,
    listener: TcpListener,
    room: Room,
    connections: Vec<Option<Connection>>,
    /// Places in `connections` to be used again.
    free: Vec<Id>,
    /// How many connections are `State::Open`, in all and from one address.
    open: usize,
    open_from: HashMap<IpAddr, usize>,
    /// Every connection's deadline, the next first.
    deadlines: BTreeSet<(Instant, Id)>,
    /// How many are behind.
    behind: usize,
    /// Who waits for the next `PACE_WINDOW`.
    paced: Vec<Id>,
    /// Whose `unread` can be looked at in the next turn.
    resumed: Vec<Id>,
    /// Who has become `State::Lost` in this turn.
    lost: Vec<Id>,
    /// What has just been read, of whichever connection.
    scratch: Vec<u8>,
    /// A line buffer for whichever connection is being read, so that none is kept while idle.
    spare_line: Vec<u8>,
    /// Given up to accept and refuse one more when descriptors have run out.
    reserve: Option<File>,
    /// The listener is left alone until then.
    accept_again: Option<Instant>,
    /// The server is stopping, and waits until then for the last lines to be delivered.
    stop_by: Option<Instant>,
    started: Instant,
    /// The time of this turn.
    now: Instant,
    console: Console,
}

impl Server {
    fn new(options: Options, listener: TcpListener, console: Console) -> io::Result<Self> {
        let mut poller = os::Poller::new()?;
        listener.set_nonblocking(true)?;
        os::set_accept_queue(&listener, ACCEPT_QUEUE);
        poller.add(&listener, LISTENER, Interest { read: true, write: false })?;
        let now = Instant::now();
        Ok(Server {
            options,
            poller,
            listener,
            room: Room::default(),
            connections: Vec::new(),
            free: Vec::new(),
            open: 0,
            open_from: HashMap::new(),
            deadlines: BTreeSet::new(),
            behind: 0,
            paced: Vec::new(),
            resumed: Vec::new(),
            lost: Vec::new(),
            scratch: vec![0; READ_SHARE],
            spare_line: Vec::new(),
            reserve: os::reserve_descriptor(),
            accept_again: None,
            stop_by: None,
            started: now,
            now,
            console,
        })
    }

    /// The loop. Returns when a signal has stopped the server, or when the poller fails.
    fn run(&mut self, stop_signal: &impl os::Pollable) -> io::Result<()> {
        self.poller.add(stop_signal, STOP_SIGNAL, Interest { read: true, write: false })?;
        let mut ready = Vec::new();
        while !self.has_stopped() {
            self.poller.wait(&mut ready, self.time_until_next_deadline())?;
            self.now = Instant::now();
            for readiness in ready.drain(..) {
                match readiness.token {
                    LISTENER => self.accept(),
                    STOP_SIGNAL => {
                        // It stays readable, and is obeyed once.
                        let _ = self.poller.remove(stop_signal, STOP_SIGNAL);
                        self.stop();
                    }
                    _ => self.serve(&readiness),
                }
                self.end_full_turn();
            }
            self.resume();
            self.expire();
            self.end_turn();
            self.console.flush();
        }
        Ok(())
    }

    fn connection(&mut self, id: Id) -> Option<&mut Connection> {
        self.connections.get_mut(id)?.as_mut()
    }

    // Arriving

    fn accept(&mut self) {
        for _ in 0..ACCEPT_SHARE {
            match self.listener.accept() {
                // A failure to set the socket up means that the peer is gone already.
                Ok((socket, address)) => drop(self.admit(socket, address)),
                Err(error) => match error.kind() {
                    ErrorKind::WouldBlock => return,
                    ErrorKind::ConnectionAborted
                    | ErrorKind::ConnectionReset
                    | ErrorKind::Interrupted => {}
                    _ if os::is_out_of_descriptors(&error) && self.reserve.take().is_some() => {
                        if let Ok((socket, address)) = self.listener.accept() {
                            self.turn_away(socket, address);
                        }
                        self.reserve = os::reserve_descriptor();
                    }
                    _ => return self.pause_accepting(),
                },
            }
        }
    }

    fn admit(&mut self, socket: TcpStream, address: SocketAddr) -> io::Result<()> {
        let address = SocketAddr::new(address.ip().to_canonical(), address.port());
        let from_there = self.open_from.get(&address.ip()).copied().unwrap_or(0);
        if self.open >= self.options.max_clients || from_there >= self.options.max_per_ip {
            self.turn_away(socket, address);
            return Ok(());
        }
        socket.set_nonblocking(true)?;
        // Each turn's lines are written at once, so there is nothing to wait for and combine.
        socket.set_nodelay(true)?;
        os::prepare(&socket);
        let interest = Interest { read: true, write: false };
        let id = self.free.pop().unwrap_or(self.connections.len());
        if let Err(error) = self.poller.add(&socket, id, interest) {
            self.free.push(id);
            return Err(error);
        }
        let connection = Connection {
            socket,
            address,
            state: State::Open,
            decoder: Decoder::default(),
            unread: Vec::new(),
            deadline: None,
            interest,
            is_blocked: false,
            is_behind: false,
            is_paced: false,
            window: 0,
            read_in_window: 0,
        };
        match self.connections.get_mut(id) {
            Some(place) => *place = Some(connection),
            None => self.connections.push(Some(connection)),
        }
        self.open += 1;
        *self.open_from.entry(address.ip()).or_default() += 1;
        self.room.connect(id);
        self.set_deadline(id, Some(self.options.name_timeout));
        self.console.log(format_args!("{address} connected"));
        Ok(())
    }

    /// Tells one too many so, and closes. What it has sent is read first, for the reason given at
    /// `State::Finished`; but nothing is awaited, because this must not use up descriptors.
    fn turn_away(&mut self, mut socket: TcpStream, address: SocketAddr) {
        let (code, text) = Refusal::Full.code_and_text();
        let mut line = Vec::new();
        put_line(&mut line, &["ERR", code, text]);
        if socket.set_nonblocking(true).is_ok() && socket.write(&line).is_ok() {
            let _ = socket.shutdown(Shutdown::Write);
            let _ = socket.read(&mut self.scratch);
        }
        self.console.log(format_args!("{address} refused (full)"));
    }

    /// Leaves the listener alone for a while, so that a lasting failure does not spin.
    fn pause_accepting(&mut self) {
        self.accept_again = Some(self.now + ACCEPT_PAUSE);
        let _ = self.poller.remove(&self.listener, LISTENER);
    }

    // Reading

    fn serve(&mut self, readiness: &Readiness) {
        let id = readiness.token;
        let Some(connection) = self.connection(id) else {
            return;
        };
        let is_read = connection.interest.read;
        if readiness.writable && mem::take(&mut connection.is_blocked) {
            self.room.touch(id);
        }
        if readiness.readable && is_read {
            self.read(id);
        } else if readiness.failed {
            self.lose(id, Reason::Disconnected);
        }
    }

    fn read(&mut self, id: Id) {
        let window = self.window();
        let somebody_is_behind = self.behind > 0;
        let Some(connection) = self.connections.get_mut(id).and_then(Option::as_mut) else {
            return;
        };
        let mut share = READ_SHARE;
        if somebody_is_behind && connection.state == State::Open {
            if connection.window != window {
                connection.window = window;
                connection.read_in_window = 0;
            }
            share = PACE.saturating_sub(connection.read_in_window as usize);
            if share == 0 {
                connection.is_paced = true;
                self.paced.push(id);
                return self.update_interest(id);
            }
        }
        let mut scratch = mem::take(&mut self.scratch);
        let read = connection.socket.read(scratch.get_mut(..share).unwrap_or_default());
        match read {
            Ok(0) => self.end_of_input(id),
            Ok(length) => {
                connection.read_in_window = connection.read_in_window.saturating_add(length as u32);
                self.digest(id, scratch.get(..length).unwrap_or_default());
            }
            Err(error) if is_not_ready(&error) => {}
            Err(_) => self.lose(id, Reason::Disconnected),
        }
        self.scratch = scratch;
    }

    /// Applies what a connection has sent to the room, line by line, until its own replies are
    /// backed up.
    fn digest(&mut self, id: Id, mut input: &[u8]) {
        let Some(connection) = self.connections.get_mut(id).and_then(Option::as_mut) else {
            return;
        };
        let mut decoder = mem::take(&mut connection.decoder);
        if decoder.is_between_lines() {
            decoder.line = mem::take(&mut self.spare_line);
            decoder.handed_out = true;
        }
        while self.is_open(id) && !self.room.is_backed_up(id) {
            match decoder.next(&mut input) {
                Some(Decoded::Line(line)) => self.request(id, line, true),
                Some(Decoded::TooLong(line)) => self.request(id, line, false),
                Some(Decoded::TelnetAnswer(answer)) => {
                    self.room.reply(id, |outbox| outbox.extend(answer))
                }
                None => break,
            }
            self.end_full_turn();
        }
        if decoder.is_between_lines() {
            self.spare_line = mem::take(&mut decoder.line);
        }
        if let Some(connection) = self.connection(id) {
            connection.decoder = decoder;
            if connection.state == State::Open && !input.is_empty() {
                connection.unread = input.to_vec();
                self.update_interest(id);
            }
        }
    }

    fn is_open(&mut self, id: Id) -> bool {
        self.connection(id).is_some_and(|connection| connection.state == State::Open)
    }

    fn request(&mut self, id: Id, line: &[u8], is_whole: bool) {
        let Some(address) = self.connection(id).map(|connection| connection.address) else {
            return;
        };
        match self.room.request(id, line, is_whole) {
            Outcome::Nothing => {}
            Outcome::Joined => {
                self.set_deadline(id, None);
                if let Some(name) = self.room.name(id) {
                    let count = self.room.count();
                    self.console.log(format_args!("{address} joined as {name}, {count} online"));
                }
            }
            Outcome::Said(text) if self.options.verbose => {
                if let Some(name) = self.room.name(id) {
                    self.console.log(format_args!("{address} {name}: {text}"));
                }
            }
            Outcome::Said(_) => {}
            Outcome::Ended(name) => {
                self.sign_off(id, name, Reason::Quit);
                self.close(id, false);
            }
        }
    }

    fn end_of_input(&mut self, id: Id) {
        match self.connection(id).map(|connection| connection.state) {
            Some(State::Open) => {
                let name = self.room.leave(id, Reason::Disconnected);
                self.sign_off(id, name, Reason::Disconnected);
                self.close(id, true);
            }
            Some(State::Closing { .. }) => self.close(id, true),
            Some(State::Finished) => self.remove(id),
            Some(State::Lost(_)) | None => {}
        }
    }

    /// Looks again at those who had to wait and need not any more.
    fn resume(&mut self) {
        for id in mem::take(&mut self.resumed) {
            if let Some(connection) = self.connection(id) {
                let unread = mem::take(&mut connection.unread);
                self.digest(id, &unread);
                self.update_interest(id);
                self.end_full_turn();
            }
        }
        let window = self.window();
        let nobody_is_behind = self.behind == 0;
        for id in mem::take(&mut self.paced) {
            match self.connection(id) {
                Some(connection) if nobody_is_behind || connection.window != window => {
                    connection.is_paced = false;
                    self.update_interest(id);
                }
                Some(_) => self.paced.push(id),
                None => {}
            }
        }
    }

    /// The number of the present `PACE_WINDOW`.
    fn window(&self) -> u32 {
        ((self.now - self.started).as_millis() / PACE_WINDOW.as_millis()) as u32
    }

    // Writing

    fn end_full_turn(&mut self) {
        if self.room.turn_is_full() {
            self.end_turn();
        }
    }

    /// Writes to everybody what they are owed, once, and takes leave of those who are lost, which
    /// the others are told in a further turn.
    fn end_turn(&mut self) {
        loop {
            let touched = mem::take(&mut self.room.touched);
            if self.room.turn.is_empty() {
                touched.into_iter().for_each(|id| self.flush(id));
            } else {
                (0..self.connections.len()).for_each(|id| self.flush(id));
            }
            self.room.end_turn();
            if self.lost.is_empty() {
                return;
            }
            while let Some(id) = self.lost.pop() {
                self.part(id);
                if self.room.turn_is_full() {
                    break;
                }
            }
        }
    }

    /// Writes to one connection what it is owed, as far as its socket takes it.
    fn flush(&mut self, id: Id) {
        let Some(connection) = self.connections.get_mut(id).and_then(Option::as_mut) else {
            return;
        };
        let Some((outbox, fresh)) = self.room.owed(id) else {
            return;
        };
        let is_open = connection.state == State::Open;
        let is_closing = matches!(connection.state, State::Closing { .. });
        if !is_closing && (!is_open || (outbox.is_empty() && fresh.is_empty())) {
            return;
        }
        let mut taken = 0;
        if !connection.is_blocked {
            match write_owed(&mut connection.socket, outbox, fresh) {
                Ok(length) => taken = length,
                Err(error) if is_not_ready(&error) => {}
                Err(_) => return self.lose(id, Reason::Disconnected),
            }
        }
        let from_outbox = taken.min(outbox.len());
        outbox.drain(..from_outbox);
        outbox.extend(fresh.get(taken - from_outbox..).unwrap_or_default());
        let left = outbox.len();
        if left == 0 && outbox.capacity() > 0 {
            *outbox = VecDeque::new();
        }
        connection.is_blocked = left > 0;

        let is_behind = is_open && left > BEHIND;
        let was_behind = mem::replace(&mut connection.is_behind, is_behind);
        self.behind = self.behind + usize::from(is_behind) - usize::from(was_behind);
        let is_delivered = is_closing && left == 0;
        let has_unread = !connection.unread.is_empty();
        if is_open && left > MAX_BACKLOG {
            return self.lose(id, Reason::Slow);
        }
        if is_delivered && connection.state == (State::Closing { input_has_ended: true }) {
            return self.remove(id);
        }
        if is_delivered {
            let _ = connection.socket.shutdown(Shutdown::Write);
            connection.state = State::Finished;
        }
        if has_unread && !self.room.is_backed_up(id) {
            self.resumed.push(id);
        }
        if is_delivered || ((is_closing || is_behind) && taken > 0) || (is_behind && !was_behind) {
            self.set_deadline(id, Some(PATIENCE));
        } else if was_behind && !is_behind {
            self.set_deadline(id, None);
        }
        self.update_interest(id);
    }

    /// Asks the poller for just what the connection's state can make use of.
    fn update_interest(&mut self, id: Id) {
        let is_backed_up = self.room.is_backed_up(id);
        let Some(connection) = self.connections.get_mut(id).and_then(Option::as_mut) else {
            return;
        };
        let waits = is_backed_up || connection.is_paced || !connection.unread.is_empty();
        let read = match connection.state {
            State::Open => !waits,
            State::Closing { input_has_ended } => !input_has_ended,
            State::Finished => true,
            State::Lost(_) => return,
        };
        let interest = Interest { read, write: connection.is_blocked };
        if mem::replace(&mut connection.interest, interest) != interest
            && self.poller.change(&connection.socket, id, interest).is_err()
        {
            self.lose(id, Reason::Disconnected);
        }
    }

    // Leaving

    /// An open connection takes no further part; `name` has left the room, if it had one.
    fn sign_off(&mut self, id: Id, name: Option<Rc<str>>, reason: Reason) {
        let Some(address) = self.connection(id).map(|connection| connection.address) else {
            return;
        };
        self.open -= 1;
        if let Some(open) = self.open_from.get_mut(&address.ip()) {
            *open -= 1;
            if *open == 0 {
                self.open_from.remove(&address.ip());
            }
        }
        match name {
            Some(name) => {
                let (reason, count) = (reason.word(), self.room.count());
                self.console.log(format_args!("{address} {name} left ({reason}), {count} online"));
            }
            None => self.console.log(format_args!("{address} disconnected")),
        }
    }

    /// Ends a connection as soon as it has been delivered what it is owed.
    fn close(&mut self, id: Id, input_has_ended: bool) {
        let Some(connection) = self.connection(id) else {
            return;
        };
        connection.state = State::Closing { input_has_ended };
        connection.unread = Vec::new();
        self.room.touch(id);
        self.set_deadline(id, Some(PATIENCE));
        self.update_interest(id);
    }

    /// Gives a connection up. It is removed, and its leaving announced, at the end of the turn.
    fn lose(&mut self, id: Id, reason: Reason) {
        if let Some(connection) = self.connection(id) {
            let was_open = match connection.state {
                State::Lost(_) => return,
                state => state == State::Open,
            };
            connection.state = State::Lost(was_open.then_some(reason));
            self.lost.push(id);
        }
    }

    /// Removes one that is lost, and tells the others.
    fn part(&mut self, id: Id) {
        if let Some(State::Lost(Some(reason))) = self.connection(id).map(|lost| lost.state) {
            let name = self.room.leave(id, reason);
            self.sign_off(id, name, reason);
        }
        self.remove(id);
    }

    /// Closes the socket and forgets the connection.
    fn remove(&mut self, id: Id) {
        self.set_deadline(id, None);
        if let Some(connection) = self.connections.get_mut(id).and_then(Option::take) {
            let _ = self.poller.remove(&connection.socket, id);
            self.behind -= usize::from(connection.is_behind);
            self.room.forget(id);
            self.free.push(id);
        }
    }

    // Time

    fn set_deadline(&mut self, id: Id, patience: Option<Duration>) {
        let deadline = patience.map(|patience| self.now + patience);
        let Some(connection) = self.connection(id) else {
            return;
        };
        let previous = mem::replace(&mut connection.deadline, deadline);
        if let Some(previous) = previous {
            self.deadlines.remove(&(previous, id));
        }
        if let Some(deadline) = deadline {
            self.deadlines.insert((deadline, id));
        }
    }

    fn time_until_next_deadline(&self) -> Option<Duration> {
        if !self.resumed.is_empty() {
            return Some(Duration::ZERO);
        }
        let deadline = self.deadlines.first().map(|&(deadline, _)| deadline);
        let is_paced = !self.paced.is_empty();
        let window = is_paced.then(|| self.started + PACE_WINDOW * (self.window() + 1));
        let console = (!self.console.pending.is_empty()).then(|| self.now + CONSOLE_PAUSE);
        let next = [deadline, window, console, self.accept_again, self.stop_by];
        let next = next.into_iter().flatten().min()?;
        Some(next.saturating_duration_since(Instant::now()))
    }

    /// Does what is due now.
    fn expire(&mut self) {
        while let Some(&(deadline, id)) = self.deadlines.first() {
            if deadline > self.now {
                break;
            }
            self.set_deadline(id, None);
            match self.connection(id).map(|connection| connection.state) {
                Some(State::Open) if self.room.name(id).is_none() => {
                    self.room.refuse(id, Refusal::Timeout);
                    self.sign_off(id, None, Reason::Disconnected);
                    self.close(id, false);
                }
                Some(State::Open) => self.lose(id, Reason::Slow),
                Some(State::Closing { .. } | State::Finished) => self.remove(id),
                // Its leaving is still to be announced, at the end of this turn.
                Some(State::Lost(_)) | None => {}
            }
        }
        if self.accept_again.is_some_and(|again| again <= self.now) && self.stop_by.is_none() {
            self.accept_again = None;
            self.reserve = self.reserve.take().or_else(os::reserve_descriptor);
            let interest = Interest { read: true, write: false };
            if self.poller.add(&self.listener, LISTENER, interest).is_err() {
                self.pause_accepting();
            }
        }
    }

    // Stopping

    /// Takes leave of everybody; the loop goes on until that is delivered or `STOP_TIMEOUT` over.
    fn stop(&mut self) {
        self.console.log(format_args!("stopping"));
        self.stop_by = Some(self.now + STOP_TIMEOUT);
        self.accept_again = None;
        let _ = self.poller.remove(&self.listener, LISTENER);
        for id in 0..self.connections.len() {
            if self.is_open(id) {
                self.room.tell(id, &["BYE the server is stopping"]);
                self.close(id, false);
            }
        }
    }

    fn has_stopped(&self) -> bool {
        let mut connections = self.connections.iter().flatten();
        self.stop_by.is_some_and(|by| {
            by <= self.now || connections.all(|connection| connection.state == State::Finished)
        })
    }
}

/// Writes what is in the outbox and, behind it, what is fresh. Returns how much was taken.
fn write_owed(socket: &mut TcpStream, outbox: &VecDeque<u8>, fresh: &[u8]) -> io::Result<usize> {
    let (first, second) = outbox.as_slices();
    if first.is_empty() {
        socket.write(fresh)
    } else if second.is_empty() && fresh.is_empty() {
        socket.write(first)
    } else {
        socket.write_vectored(&[first, second, fresh].map(IoSlice::new))
    }
}

/// Whether a call on a socket is only to be tried again when the socket is ready.
fn is_not_ready(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
}

// ---------------------------------------------------------------------------------------------
// 4. The console: what the person running the server sees
// ---------------------------------------------------------------------------------------------

/// Writes lines to standard output and never waits for it: what nobody reads is dropped and
/// counted. Names and texts come here only after `parse`, so they cannot forge a line.
struct Console {
    /// Takes what it can without waiting, and says `WouldBlock` when that is nothing.
    out: Box<dyn Write>,
    pending: Vec<u8>,
    dropped: u64,
}

impl Console {
    /// Bytes kept while standard output takes none.
    const MAX_PENDING: usize = 64 * 1024;

    fn new(out: Box<dyn Write>) -> Self {
        Console { out, pending: Vec::new(), dropped: 0 }
    }

    /// One line, with the time in front.
    fn log(&mut self, what: fmt::Arguments) {
        let time = utc(SystemTime::now());
        if self.pending.len() > Self::MAX_PENDING {
            self.dropped += 1;
            return;
        }
        if self.dropped > 0 {
            let dropped = mem::take(&mut self.dropped);
            let _ = writeln!(self.pending, "{time} {dropped} lines dropped: nobody read them");
        }
        let _ = writeln!(self.pending, "{time} {what}");
    }

    /// Shows what has been logged, as far as standard output takes it without waiting.
    fn flush(&mut self) {
        while !self.pending.is_empty() {
            match self.out.write(&self.pending) {
                Ok(length @ 1..) => drop(self.pending.drain(..length)),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                // Closed, or the disk is full: there is nobody to tell.
                Ok(_) | Err(_) => self.pending.clear(),
            }
        }
    }
}

/// A time as RFC 3339 writes it, in UTC, to the second.
fn utc(time: SystemTime) -> String {
    let seconds = time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let (mut days, second) = (seconds / 86_400, seconds % 86_400);
    let mut year = 1970;
    let is_leap = |year: u64| year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
    while days >= 365 + u64::from(is_leap(year)) {
        days -= 365 + u64::from(is_leap(year));
        year += 1;
    }
    let february = 28 + u64::from(is_leap(year));
    let mut month = 1;
    for length in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30] {
        if days < length {
            break;
        }
        days -= length;
        month += 1;
    }
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{:02}T{hour:02}:{minute:02}:{second:02}Z", days + 1)
}

// ---------------------------------------------------------------------------------------------
// 5. The command line
// ---------------------------------------------------------------------------------------------

const USAGE: &str = "Usage: linechat-server [OPTIONS] [ADDR]

One chat room for everybody who can send a line of text: telnet, nc, or linechat-client.
ADDR is HOST:PORT; by default port 9999 on every address. Port 0 picks a free one.

Options:
  --max-clients N      connections at the same time (default: what the file limit allows)
  --max-per-ip N       connections at the same time from one address (default: no limit)
  --name-timeout SECS  how long a connection may go without a name (default: 60)
  --verbose            show public messages too; private ones are never shown
  --help               show this
  --version            show the version
";

/// Where a socket for IPv6 serves IPv4 too; on the other systems it would serve IPv6 alone.
const DEFAULT_ADDRESS: &str = match cfg!(any(target_os = "linux", target_os = "macos")) {
    true => "[::]:9999",
    false => DEFAULT_ADDRESS_WITHOUT_IPV6,
};
const DEFAULT_ADDRESS_WITHOUT_IPV6: &str = "0.0.0.0:9999";

#[derive(Debug, PartialEq, Eq)]
struct Options {
    address: Option<String>,
    max_clients: usize,
    max_per_ip: usize,
    name_timeout: Duration,
    verbose: bool,
}

#[derive(Debug, PartialEq, Eq)]
enum Command {
    Run(Options),
    Show(String),
}

/// Reads the command line; an error is one sentence for standard error.
fn parse_arguments(arguments: impl Iterator<Item = String>) -> Result<Command, String> {
    let mut options = Options {
        address: None,
        max_clients: usize::MAX,
        max_per_ip: usize::MAX,
        name_timeout: NAME_TIMEOUT,
        verbose: false,
    };
    let mut arguments = arguments;
    while let Some(argument) = arguments.next() {
        let (name, value) = match argument.split_once('=') {
            Some((name, value)) if name.starts_with("--") => (name, Some(value.to_owned())),
            _ => (&*argument, None),
        };
        let mut number = || {
            let value = value.clone().or_else(|| arguments.next());
            let value = value.ok_or(format!("{name} needs a number after it"))?;
            match value.parse::<u32>() {
                Ok(number) if number > 0 => Ok(number),
                _ => Err(format!(
                    "{name} takes a whole number from 1 to {}, not '{value}'",
                    u32::MAX
                )),
            }
        };
        match name {
            "--max-clients" => options.max_clients = number()? as usize,
            "--max-per-ip" => options.max_per_ip = number()? as usize,
            "--name-timeout" => options.name_timeout = Duration::from_secs(number()?.into()),
            _ if value.is_some() => return Err(format!("there is no option {argument}")),
            "--verbose" => options.verbose = true,
            "--help" | "-h" => return Ok(Command::Show(USAGE.to_owned())),
            "--version" | "-V" => {
                let version = env!("CARGO_PKG_VERSION");
                return Ok(Command::Show(format!("linechat-server {version}\n")));
            }
            _ if name.starts_with('-') => return Err(format!("there is no option {name}")),
            _ if options.address.is_some() => {
                return Err(format!("'{name}' is one address too many"))
            }
            _ => {
                let port = name.rsplit_once(':').and_then(|(_, port)| port.parse::<u16>().ok());
                if port.is_none() {
                    return Err(format!("'{name}' is not HOST:PORT, as in 127.0.0.1:9999"));
                }
                options.address = Some(name.to_owned());
            }
        }
    }
    Ok(Command::Run(options))
}

fn bind(address: Option<&str>) -> Result<TcpListener, String> {
    let explain = |address: &str, error: io::Error| {
        let advice = match error.kind() {
            ErrorKind::AddrInUse => "; is another server running? Give another port",
            ErrorKind::PermissionDenied => "; ports below 1024 need special rights",
            _ => "",
        };
        format!("cannot listen on {address}: {error}{advice}")
    };
    match address {
        Some(address) => TcpListener::bind(address).map_err(|error| explain(address, error)),
        None => TcpListener::bind(DEFAULT_ADDRESS).or_else(|error| match error.kind() {
            ErrorKind::AddrInUse => Err(explain(DEFAULT_ADDRESS, error)),
            _ => TcpListener::bind(DEFAULT_ADDRESS_WITHOUT_IPV6)
                .map_err(|error| explain(DEFAULT_ADDRESS_WITHOUT_IPV6, error)),
        }),
    }
}

fn serve(mut options: Options) -> Result<(), String> {
    let allowed = os::raise_descriptor_limit().saturating_sub(RESERVED_DESCRIPTORS);
    options.max_clients = options.max_clients.min(allowed);
    let listener = bind(options.address.as_deref())?;
    let run = || -> io::Result<()> {
        let stop_signal = os::stop_signal()?;
        let address = listener.local_addr()?;
        let console = Console::new(Box::new(os::standard_output()?));
        let mut server = Server::new(options, listener, console)?;
        server.console.log(format_args!("listening on {address}"));
        server.console.flush();
        server.run(&stop_signal)
    };
    run().map_err(|error| format!("the operating system refused what the server needs: {error}"))
}

fn main() -> ExitCode {
    let complain = |text: &str| drop(writeln!(io::stderr(), "linechat-server: {text}"));
    let arguments = std::env::args_os().skip(1).map(|word| word.to_string_lossy().into_owned());
    match parse_arguments(arguments) {
        Ok(Command::Show(text)) => match io::stdout().write_all(text.as_bytes()) {
            Ok(()) => ExitCode::SUCCESS,
            Err(_) => ExitCode::FAILURE,
        },
        Ok(Command::Run(options)) => match serve(options) {
            Ok(()) => ExitCode::SUCCESS,
            Err(text) => {
                complain(&text);
                ExitCode::FAILURE
            }
        },
        Err(text) => {
            complain(&format!("{text}; try --help"));
            ExitCode::from(2)
        }
    }
}

// ---------------------------------------------------------------------------------------------
// 6. The operating system: the few calls that std lacks, and the only `unsafe`
// ---------------------------------------------------------------------------------------------

/// Every constant and structure is from the header or the manual page named beside it.
#[allow(unsafe_code)]
mod os {
    use super::{Interest, Readiness};
    use std::ffi::c_int;
    use std::fs::File;
    use std::io;
    use std::net::{TcpListener, TcpStream};
    use std::time::Duration;

    pub use console::standard_output;
    pub use readiness::Poller;
    pub use stopping::stop_signal;

    /// What the poller can watch, and its number.
    #[cfg(unix)]
    pub use std::os::fd::{AsRawFd as Pollable, RawFd as Number};
    #[cfg(windows)]
    pub use std::os::windows::io::{AsRawSocket as Pollable, RawSocket as Number};

    fn number_of(socket: &impl Pollable) -> Number {
        #[cfg(unix)]
        return socket.as_raw_fd();
        #[cfg(windows)]
        return socket.as_raw_socket();
    }

    /// The result of a call, or the error that it left behind.
    fn check(result: c_int) -> io::Result<c_int> {
        match result {
            -1 => Err(io::Error::last_os_error()),
            result => Ok(result),
        }
    }

    /// A time-out in milliseconds, rounded up so that nothing is early; -1 waits for ever.
    fn milliseconds(timeout: Option<Duration>) -> c_int {
        timeout.map_or(-1, |timeout| {
            c_int::try_from(timeout.as_nanos().div_ceil(1_000_000)).unwrap_or(c_int::MAX)
        })
    }

    /// Readiness on Linux: epoll(7). `--cfg linechat_poll` builds what other systems have instead.
    #[cfg(all(target_os = "linux", not(linechat_poll)))]
    mod readiness {
        use super::{check, milliseconds, number_of, Interest, Pollable, Readiness};
        use std::ffi::c_int;
        use std::io;
        use std::os::fd::{FromRawFd, OwnedFd};
        use std::time::Duration;

        extern "C" {
            fn epoll_create1(flags: c_int) -> c_int;
            fn epoll_ctl(poller: c_int, what: c_int, fd: c_int, event: *mut EpollEvent) -> c_int;
            fn epoll_wait(poller: c_int, events: *mut EpollEvent, max: c_int, ms: c_int) -> c_int;
        }

        /// `struct epoll_event`, which is packed on x86-64 only (<sys/epoll.h>).
        #[repr(C)]
        #[cfg_attr(target_arch = "x86_64", repr(packed))]
        #[derive(Clone, Copy)]
        struct EpollEvent {
            events: u32,
            token: u64,
        }

        const EPOLL_CLOEXEC: c_int = 0o2_000_000;
        const EPOLL_CTL_ADD: c_int = 1;
        const EPOLL_CTL_DEL: c_int = 2;
        const EPOLL_CTL_MOD: c_int = 3;
        const EPOLLIN: u32 = 0x1;
        const EPOLLOUT: u32 = 0x4;
        const EPOLLERR: u32 = 0x8;
        const EPOLLHUP: u32 = 0x10;

        /// Tells which sockets are ready, for as long as they are (level-triggered). A token stands
        /// for one socket, from `add` to `remove`.
        pub struct Poller {
            epoll: OwnedFd,
            events: Vec<EpollEvent>,
        }

        impl Poller {
            pub fn new() -> io::Result<Self> {
                // SAFETY: takes no pointer; the descriptor it returns is nobody else's.
                let epoll = unsafe { OwnedFd::from_raw_fd(check(epoll_create1(EPOLL_CLOEXEC))?) };
                Ok(Poller { epoll, events: vec![EpollEvent { events: 0, token: 0 }; 1024] })
            }

            pub fn add(
                &mut self,
                socket: &impl Pollable,
                token: usize,
                interest: Interest,
            ) -> io::Result<()> {
                self.control(EPOLL_CTL_ADD, socket, token, interest)
            }

            pub fn change(
                &mut self,
                socket: &impl Pollable,
                token: usize,
                interest: Interest,
            ) -> io::Result<()> {
                self.control(EPOLL_CTL_MOD, socket, token, interest)
            }

            pub fn remove(&mut self, socket: &impl Pollable, token: usize) -> io::Result<()> {
                let interest = Interest { read: false, write: false };
                self.control(EPOLL_CTL_DEL, socket, token, interest)
            }

            /// Waits until something is ready or the time is over, and fills `ready`.
            pub fn wait(
                &mut self,
                ready: &mut Vec<Readiness>,
                timeout: Option<Duration>,
            ) -> io::Result<()> {
                ready.clear();
                let timeout = milliseconds(timeout);
                let room = self.events.len() as c_int;
                // SAFETY: `events` is writable for `room` entries, and outlives the call.
                let count = check(unsafe {
                    epoll_wait(self.epoll.as_raw_fd(), self.events.as_mut_ptr(), room, timeout)
                });
                let count = match count {
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
                    count => count?,
                };
                ready.extend(self.events.iter().take(count as usize).map(|event| {
                    let EpollEvent { events, token } = *event;
                    let failed = events & (EPOLLERR | EPOLLHUP) != 0;
                    Readiness {
                        token: token as usize,
                        readable: failed || events & EPOLLIN != 0,
                        writable: failed || events & EPOLLOUT != 0,
                        failed,
                    }
                }));
                Ok(())
            }

            fn control(
                &self,
                operation: c_int,
                socket: &impl Pollable,
                token: usize,
                interest: Interest,
            ) -> io::Result<()> {
                let read = if interest.read { EPOLLIN } else { 0 };
                let write = if interest.write { EPOLLOUT } else { 0 };
                let mut event = EpollEvent { events: read | write, token: token as u64 };
                // SAFETY: `event` outlives the call; the kernel keeps a copy.
                check(unsafe {
                    epoll_ctl(self.epoll.as_raw_fd(), operation, number_of(socket), &mut event)
                })?;
                Ok(())
            }
        }
    }

    /// Readiness everywhere else: poll(2), which Windows calls WSAPoll. It is told of every socket
    /// at every turn, so a large room costs more than with epoll.
    #[cfg(not(all(target_os = "linux", not(linechat_poll))))]
    mod readiness {
        use super::{check, milliseconds, number_of, Interest, Number, Pollable, Readiness};
        use std::collections::{BTreeMap, BTreeSet};
        use std::io;
        use std::thread;
        use std::time::Duration;

        /// `struct pollfd` (<poll.h>); `WSAPOLLFD` (<winsock2.h>) has the same fields.
        #[repr(C)]
        struct Entry {
            socket: Number,
            events: i16,
            returned: i16,
        }

        /// What differs between the systems: `nfds_t`, the flags (<poll.h>, <winsock2.h>), and the
        /// name. Windows lets nothing be asked for but POLLRDNORM, POLLRDBAND and POLLWRNORM.
        #[cfg(unix)]
        mod system {
            #[cfg(target_os = "linux")]
            pub type Count = std::ffi::c_ulong;
            #[cfg(not(target_os = "linux"))]
            pub type Count = std::ffi::c_uint;
            pub const READ: i16 = 0x1;
            pub const WRITE: i16 = 0x4;
            pub const ERROR: i16 = 0x8;
            pub const HANGUP: i16 = 0x10;
            pub const INVALID: i16 = 0x20;
            extern "C" {
                pub fn poll(entries: *mut super::Entry, count: Count, ms: i32) -> i32;
            }
        }
        #[cfg(windows)]
        mod system {
            pub type Count = u32;
            pub const READ: i16 = 0x100 | 0x200;
            pub const WRITE: i16 = 0x10;
            pub const ERROR: i16 = 0x1;
            pub const HANGUP: i16 = 0x2;
            pub const INVALID: i16 = 0x4;
            #[link(name = "ws2_32")]
            extern "system" {
                #[link_name = "WSAPoll"]
                pub fn poll(entries: *mut super::Entry, count: Count, ms: i32) -> i32;
            }
        }

        /// Linux hangs up when both directions have ended. Elsewhere that may mean that the peer
        /// has ended only its own, and may still be owed something.
        const FAILURE: i16 = match cfg!(target_os = "linux") {
            true => system::ERROR | system::INVALID | system::HANGUP,
            false => system::ERROR | system::INVALID,
        };

        /// A hang-up cannot be asked not to be reported. Where nobody can make use of it yet, the
        /// socket is left out for so long, which is better than to spin.
        const REST: Duration = Duration::from_millis(50);

        /// Tells which sockets are ready, for as long as they are (level-triggered). A token stands
        /// for one socket, from `add` to `remove`.
        #[derive(Default)]
        pub struct Poller {
            watched: BTreeMap<usize, (Number, Interest)>,
            resting: BTreeSet<usize>,
            entries: Vec<Entry>,
            tokens: Vec<usize>,
        }

        impl Poller {
            pub fn new() -> io::Result<Self> {
                Ok(Poller::default())
            }

            pub fn add(
                &mut self,
                socket: &impl Pollable,
                token: usize,
                interest: Interest,
            ) -> io::Result<()> {
                self.watched.insert(token, (number_of(socket), interest));
                Ok(())
            }

            pub fn change(
                &mut self,
                socket: &impl Pollable,
                token: usize,
                interest: Interest,
            ) -> io::Result<()> {
                self.resting.remove(&token);
                self.add(socket, token, interest)
            }

            pub fn remove(&mut self, _socket: &impl Pollable, token: usize) -> io::Result<()> {
                self.resting.remove(&token);
                self.watched.remove(&token);
                Ok(())
            }

            /// Waits until something is ready or the time is over, and fills `ready`.
            pub fn wait(
                &mut self,
                ready: &mut Vec<Readiness>,
                timeout: Option<Duration>,
            ) -> io::Result<()> {
                ready.clear();
                self.entries.clear();
                self.tokens.clear();
                for (&token, &(socket, interest)) in &self.watched {
                    if !self.resting.contains(&token) {
                        let read = if interest.read { system::READ } else { 0 };
                        let write = if interest.write { system::WRITE } else { 0 };
                        self.entries.push(Entry { socket, events: read | write, returned: 0 });
                        self.tokens.push(token);
                    }
                }
                let timeout = match self.resting.is_empty() {
                    true => timeout,
                    false => Some(timeout.map_or(REST, |timeout| timeout.min(REST))),
                };
                self.resting.clear();
                if self.entries.is_empty() {
                    // An error on Windows.
                    thread::sleep(timeout.unwrap_or(REST));
                    return Ok(());
                }
                let count = self.entries.len() as system::Count;
                // SAFETY: `entries` has `count` entries, is writable, and outlives the call.
                let waited = check(unsafe {
                    system::poll(self.entries.as_mut_ptr(), count, milliseconds(timeout))
                });
                match waited {
                    Err(error) if error.kind() != io::ErrorKind::Interrupted => return Err(error),
                    Err(_) | Ok(0) => return Ok(()),
                    Ok(_) => {}
                }
                for (&token, entry) in self.tokens.iter().zip(&self.entries) {
                    let failed = entry.returned & FAILURE != 0;
                    let hangup = entry.returned & system::HANGUP != 0;
                    let reads = entry.events & system::READ != 0;
                    let readable = failed || entry.returned & system::READ != 0 || hangup && reads;
                    let writable = failed || entry.returned & system::WRITE != 0;
                    if readable || writable {
                        ready.push(Readiness { token, readable, writable, failed });
                    } else if hangup {
                        self.resting.insert(token);
                    }
                }
                Ok(())
            }
        }
    }

    // Sockets

    // socket(7); <sys/socket.h> on the BSDs and macOS, <winsock2.h>. The numbers for Linux, here and
    // below, are those of x86, ARM and RISC-V.
    const IS_LINUX: bool = cfg!(target_os = "linux");
    const SOL_SOCKET: c_int = if IS_LINUX { 1 } else { 0xffff };
    const SO_KEEPALIVE: c_int = if IS_LINUX { 9 } else { 0x8 };
    const SO_OOBINLINE: c_int = if IS_LINUX { 10 } else { 0x100 };
    const IPPROTO_TCP: c_int = 6;

    /// When an idle peer is asked for a sign of life, how often then, and how many times: 30 s, 10 s,
    /// 3; then how long what is sent may go unanswered; then how much of it the kernel may keep. By
    /// tcp(7); <netinet/tcp.h> on the others, <ws2ipdef.h>.
    const TCP_OPTIONS: &[(c_int, c_int)] = if IS_LINUX {
        // TCP_KEEPIDLE, TCP_KEEPINTVL, TCP_KEEPCNT, TCP_USER_TIMEOUT (ms), TCP_NOTSENT_LOWAT
        &[(4, 30), (5, 10), (6, 3), (18, 50_000), (25, 128 * 1024)]
    } else if cfg!(target_os = "macos") {
        // TCP_KEEPALIVE, TCP_KEEPINTVL, TCP_KEEPCNT, TCP_RXT_CONNDROPTIME (s), TCP_NOTSENT_LOWAT
        &[(0x10, 30), (0x101, 10), (0x102, 3), (0x80, 50), (0x201, 128 * 1024)]
    } else if cfg!(windows) {
        // TCP_KEEPIDLE, TCP_KEEPINTVL, TCP_KEEPCNT, TCP_MAXRT (s)
        &[(3, 30), (17, 10), (16, 3), (5, 50)]
    } else if cfg!(target_os = "freebsd") {
        // TCP_KEEPIDLE, TCP_KEEPINTVL, TCP_KEEPCNT. The BSDs have nothing for what is being sent:
        // a peer that vanishes then is noticed after some ten minutes.
        &[(256, 30), (512, 10), (1024, 3)]
    } else if cfg!(target_os = "netbsd") {
        &[(3, 30), (5, 10), (6, 3)]
    } else {
        // OpenBSD sets these times for the whole system, by sysctl(8).
        &[]
    };

    #[cfg_attr(windows, link(name = "ws2_32"))]
    extern "system" {
        fn setsockopt(
            socket: Number,
            level: c_int,
            name: c_int,
            value: *const c_int,
            size: c_int,
        ) -> c_int;
        #[cfg(unix)]
        fn listen(socket: Number, queue: c_int) -> c_int;
    }

    /// Lets a peer that vanished be noticed within about a minute, whether it is sent something
    /// or not; telnet's urgent bytes be read in their place; and what a slow peer is owed wait
    /// here, where it is limited, and not in the megabytes that the kernel would take. What a
    /// system does not know is done without.
    pub fn prepare(socket: &TcpStream) {
        let set = |level: c_int, name: c_int, value: c_int| {
            let size = size_of::<c_int>() as c_int;
            // SAFETY: `value` outlives the call, and its size is the one given.
            unsafe { setsockopt(number_of(socket), level, name, &value, size) };
        };
        set(SOL_SOCKET, SO_KEEPALIVE, 1);
        set(SOL_SOCKET, SO_OOBINLINE, 1);
        TCP_OPTIONS.iter().for_each(|&(name, value)| set(IPPROTO_TCP, name, value));
    }

    /// Sets how many connections wait to be accepted; std asks for 128. The kernel lowers it to its
    /// own limit (listen(2)). Windows cannot be asked a second time.
    pub fn set_accept_queue(listener: &TcpListener, queue: c_int) {
        #[cfg(unix)]
        // SAFETY: takes no pointer; a socket that listens already may be told again.
        unsafe {
            listen(number_of(listener), queue);
        }
        #[cfg(windows)]
        let _ = (listener, queue);
    }

    // Descriptors: getrlimit(2), accept(2)

    #[cfg(unix)]
    extern "C" {
        fn getrlimit(resource: c_int, limit: *mut ResourceLimit) -> c_int;
        fn setrlimit(resource: c_int, limit: *const ResourceLimit) -> c_int;
    }

    /// `struct rlimit` (<sys/resource.h>), where `rlim_t` is 64 bits wide everywhere but in glibc
    /// on 32-bit machines, where it is as wide as `unsigned long`.
    #[cfg(unix)]
    #[repr(C)]
    struct ResourceLimit {
        soft: RlimT,
        hard: RlimT,
    }

    #[cfg(all(unix, not(all(target_env = "gnu", target_pointer_width = "32"))))]
    type RlimT = u64;
    #[cfg(all(target_env = "gnu", target_pointer_width = "32"))]
    type RlimT = u32;

    /// Raises the soft limit on open files to the hard one, or as far as the system lets it be
    /// raised. Returns what then holds. Windows has no such limit.
    pub fn raise_descriptor_limit() -> usize {
        #[cfg(windows)]
        return usize::MAX;
        #[cfg(unix)]
        {
            const RLIMIT_NOFILE: c_int = if IS_LINUX { 7 } else { 8 };
            // macOS takes no more than this, whatever the hard limit says (setrlimit(2), OPEN_MAX).
            const OPEN_MAX: RlimT = 10_240;
            let mut limit = ResourceLimit { soft: 0, hard: 0 };
            // SAFETY: `limit` outlives the calls, which write and read it as the structure it is.
            unsafe {
                if getrlimit(RLIMIT_NOFILE, &mut limit) == -1 {
                    return 256;
                }
                for soft in [limit.hard, limit.hard.min(OPEN_MAX)] {
                    let raised = ResourceLimit { soft, hard: limit.hard };
                    if soft > limit.soft && setrlimit(RLIMIT_NOFILE, &raised) == 0 {
                        limit.soft = soft;
                    }
                }
            }
            usize::try_from(limit.soft).unwrap_or(usize::MAX)
        }
    }

    /// A descriptor held only to be given up when there is no other.
    pub fn reserve_descriptor() -> Option<File> {
        File::open(if cfg!(windows) { "NUL" } else { "/dev/null" }).ok()
    }

    pub fn is_out_of_descriptors(error: &io::Error) -> bool {
        // ENFILE and EMFILE (<errno.h>), the same on every Unix; WSAEMFILE (<winerror.h>).
        let codes: &[i32] = if cfg!(windows) { &[10024] } else { &[23, 24] };
        error.raw_os_error().is_some_and(|code| codes.contains(&code))
    }

    /// Standard output on Linux: poll(2), open(2).
    #[cfg(all(target_os = "linux", not(linechat_poll)))]
    mod console {
        use std::ffi::{c_int, c_ulong};
        use std::fs::{File, OpenOptions};
        use std::io::{self, ErrorKind, Write};
        use std::os::fd::{AsFd, AsRawFd};
        use std::os::unix::fs::OpenOptionsExt;

        extern "C" {
            fn poll(entries: *mut PollFd, count: c_ulong, ms: c_int) -> c_int;
        }

        /// `struct pollfd` (<poll.h>).
        #[repr(C)]
        struct PollFd {
            fd: c_int,
            events: i16,
            returned: i16,
        }

        const POLLOUT: i16 = 4;
        const O_NONBLOCK: c_int = 0o4000;
        /// A pipe that reports readiness takes at least this much without waiting (pipe(7),
        /// PIPE_BUF).
        const PIPE_SHARE: usize = 4096;

        /// Writes to standard output without ever waiting for it.
        pub struct Output(File);

        /// Standard output, opened a second time so that it can be made not to wait without doing
        /// the same to every other program on the terminal. What cannot be opened again, such as a
        /// socket, is used as it is.
        pub fn standard_output() -> io::Result<Output> {
            let reopened =
                OpenOptions::new().append(true).custom_flags(O_NONBLOCK).open("/proc/self/fd/1");
            let file =
                reopened.or_else(|_| io::stdout().as_fd().try_clone_to_owned().map(File::from));
            file.map(Output)
        }

        impl Write for Output {
            fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
                let mut entry = PollFd { fd: self.0.as_raw_fd(), events: POLLOUT, returned: 0 };
                // SAFETY: `entry` is the one entry that the count announces, and outlives the call.
                match unsafe { poll(&mut entry, 1, 0) } {
                    0 => Err(ErrorKind::WouldBlock.into()),
                    _ => self.0.write(bytes.get(..PIPE_SHARE).unwrap_or(bytes)),
                }
            }

            fn flush(&mut self) -> io::Result<()> {
                self.0.flush()
            }
        }
    }

    /// Standard output everywhere else: a terminal that is paused (on Windows, in which something
    /// is selected) keeps who writes to it waiting, so that is a thread of its own.
    #[cfg(not(all(target_os = "linux", not(linechat_poll))))]
    mod console {
        use std::io::{self, ErrorKind, Write};
        use std::sync::mpsc::{sync_channel, Receiver, SyncSender, TrySendError};
        use std::thread;
        use std::time::Duration;

        /// Pieces handed over before they are written, so that a burst is not held up.
        const LINES_AHEAD: usize = 16;
        /// How long the last lines may take to be shown at the end.
        const PATIENCE: Duration = Duration::from_secs(1);

        /// Writes to standard output without ever waiting for it.
        pub struct Output {
            lines: Option<SyncSender<Vec<u8>>>,
            is_done: Receiver<()>,
        }

        pub fn standard_output() -> io::Result<Output> {
            let (sender, lines) = sync_channel::<Vec<u8>>(LINES_AHEAD);
            let (done, is_done) = sync_channel(1);
            thread::Builder::new().spawn(move || {
                let mut out = io::stdout();
                for bytes in lines {
                    if out.write_all(&bytes).and_then(|()| out.flush()).is_err() {
                        break;
                    }
                }
                let _ = done.send(());
            })?;
            Ok(Output { lines: Some(sender), is_done })
        }

        impl Write for Output {
            fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
                let Some(lines) = &self.lines else { return Err(ErrorKind::BrokenPipe.into()) };
                match lines.try_send(bytes.to_vec()) {
                    Ok(()) => Ok(bytes.len()),
                    Err(TrySendError::Full(_)) => Err(ErrorKind::WouldBlock.into()),
                    Err(TrySendError::Disconnected(_)) => Err(ErrorKind::BrokenPipe.into()),
                }
            }

            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }

        impl Drop for Output {
            fn drop(&mut self) {
                self.lines = None;
                let _ = self.is_done.recv_timeout(PATIENCE);
            }
        }
    }

    /// What asks the server to stop on Unix: signal(7).
    #[cfg(unix)]
    mod stopping {
        use std::ffi::c_int;
        use std::io;
        use std::os::fd::AsRawFd;
        use std::os::unix::net::UnixStream;
        use std::sync::atomic::{AtomicI32, Ordering};

        extern "C" {
            fn signal(number: c_int, handler: usize) -> usize;
            fn write(fd: c_int, bytes: *const u8, count: usize) -> isize;
            fn _exit(status: c_int) -> !;
        }

        // <signal.h>: these are the same on every Unix.
        const SIGHUP: c_int = 1;
        const SIGINT: c_int = 2;
        const SIGTERM: c_int = 15;
        const SIG_IGN: usize = 1;

        /// The writing end of the pair whose other end `stop_signal` returned; -1 once it was used.
        static STOP: AtomicI32 = AtomicI32::new(-1);

        /// Returns a socket that becomes readable when SIGINT or SIGTERM asks the server to stop; a
        /// second one ends the process at once. A terminal that goes away (SIGHUP) does not stop
        /// it; std has SIGPIPE ignored already.
        pub fn stop_signal() -> io::Result<UnixStream> {
            let (reader, writer) = UnixStream::pair()?;
            reader.set_nonblocking(true)?;
            STOP.store(writer.as_raw_fd(), Ordering::SeqCst);
            std::mem::forget(writer);
            // SAFETY: the handler only does what signal-safety(7) allows.
            unsafe {
                signal(SIGHUP, SIG_IGN);
                signal(SIGINT, on_stop_signal as *const () as usize);
                signal(SIGTERM, on_stop_signal as *const () as usize);
            }
            Ok(reader)
        }

        extern "C" fn on_stop_signal(number: c_int) {
            let writer = STOP.swap(-1, Ordering::SeqCst);
            // SAFETY: the descriptor stays open for ever; one byte is there to be written.
            unsafe {
                if writer == -1 {
                    _exit(128 + number);
                }
                write(writer, b"!".as_ptr(), 1);
            }
        }
    }

    /// What asks the server to stop on Windows: Ctrl-C, Ctrl-Break, and closing the window
    /// (SetConsoleCtrlHandler, <consoleapi.h>).
    #[cfg(windows)]
    mod stopping {
        use std::io;
        use std::net::UdpSocket;
        use std::sync::atomic::{AtomicBool, Ordering};
        use std::sync::OnceLock;
        use std::thread;
        use std::time::Duration;

        #[link(name = "kernel32")]
        extern "system" {
            fn SetConsoleCtrlHandler(handler: extern "system" fn(u32) -> i32, add: i32) -> i32;
        }

        const CTRL_CLOSE_EVENT: u32 = 2;

        static STOP: OnceLock<UdpSocket> = OnceLock::new();
        static HAS_STOPPED: AtomicBool = AtomicBool::new(false);

        /// Returns a socket that becomes readable when the server is to stop; a second Ctrl-C ends
        /// the process at once. What wakes it is a packet that the socket sends to itself.
        pub fn stop_signal() -> io::Result<UdpSocket> {
            let socket = UdpSocket::bind("127.0.0.1:0")?;
            socket.connect(socket.local_addr()?)?;
            let _ = STOP.set(socket.try_clone()?);
            // SAFETY: the handler is there as long as the process.
            match unsafe { SetConsoleCtrlHandler(on_stop_signal, 1) } {
                0 => Err(io::Error::last_os_error()),
                _ => Ok(socket),
            }
        }

        /// Windows calls this in a thread of its own. Returning 0 ends the process.
        extern "system" fn on_stop_signal(event: u32) -> i32 {
            if HAS_STOPPED.swap(true, Ordering::SeqCst) {
                return 0;
            }
            if let Some(socket) = STOP.get() {
                let _ = socket.send(b"!");
            }
            if event == CTRL_CLOSE_EVENT {
                // The process is ended when this returns; the loop needs at most a second.
                thread::sleep(Duration::from_secs(2));
            }
            1
        }
    }
}

#[cfg(test)]
#[path = "conformance/linechat/server_tests.rs"]
mod tests;
