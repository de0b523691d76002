//! linechat-server: one chat room for everybody who can send a line of text.
//!
//! Try it:
//!
//!     cargo run --release --bin linechat-server     (or: make run-server)
//!     telnet localhost 9999                         (in two more windows)
//!     NAME ana
//!     MSG hello, everyone
//!
//! PROTOCOL.md says what goes over the wire; `--help` lists the options. One thread runs the chat,
//! in turns; another only prints what the console shows. The parts, of which 1 to 4 know nothing of
//! those behind them, and 5 only the socket of 9:
//!
//! 1. the wire: bytes into lines, lines into requests, replies into lines;
//! 2. delivery: what each client is owed, and how much of that others have caused;
//! 3. the room: who is here, and what each request does;
//! 4. flow control: whose request goes on, and when, while somebody cannot keep up; the fair queue
//!    by which the loop, too, tells who is next;
//! 5. a connection: its socket and its states;
//! 6. the loop: wait, dispatch, write, time-outs, arriving and leaving;
//! 7. the console, and 8. the command line;
//! 9. the operating system: the few calls that std lacks, and the only `unsafe`.
//!
//! A turn, from top to bottom (`Server::turn`):
//!
//!     Poller::wait
//!     note_readiness, obey ─ of sockets, and of signals: stop at the end of the turn, show_status
//!     accept ─────────────── add_connection: limits, HELLO; or turn_away
//!     carry_out_waiting ──── Flow::next: requests and leaves that have waited for the budget
//!     serve_all ──────────── each connection with something to read, who asks for little first:
//!       serve, read            at most 16 KiB
//!       digest                 Decoder::next, until the turn is full or the connection must wait
//!         request              is it a person? while the budget applies: cost, Flow::admit
//!         carry_out            parse, Room::carry_out, which fills Delivery
//!     flush ──────────────── write: once to each client that is owed something; after_write
//!     expire ─────────────── time-outs
//!
//! What it does not do: passwords, encryption, several rooms, history.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::fmt;
use std::fmt::Write as _;
use std::io::{self, ErrorKind, IoSlice, Read, Write};
use std::mem;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr};
use std::rc::Rc;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
#[cfg(not(test))]
use std::{process::ExitCode, thread};
use Asker::{Anybody, Named, Unnamed};

#[cfg(not(test))]
use system as os;
#[cfg(test)]
#[path = "conformance/linechat/simulation.rs"]
mod os;

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
/// Bytes of backlog beyond which a client makes the budget apply to everybody.
const SOFT_LIMIT: usize = 256 * 1024;
/// Bytes of backlog beyond which a client is removed: the soft limit and a minute of the budget.
const HARD_LIMIT: usize = SOFT_LIMIT + 60 * BUDGET;
/// Bytes a second that all requests together may cause for others while the budget applies, and
/// the bytes of its bucket.
const BUDGET: usize = 64 * 1024;
/// Bytes of replies that a client has not taken beyond which its further requests wait.
const REPLY_LIMIT: usize = 64 * 1024;
/// How long one over the soft limit may take nothing.
const STALL_TIMEOUT: Duration = Duration::from_secs(60);
/// How long a connection may go without a name (`--name-timeout`).
const NAME_TIMEOUT: Duration = Duration::from_secs(60);
/// How long what is owed to a closing connection may take to be delivered, and how long it may take
/// nothing or, once everything is delivered, not end its side.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(60);
const CLOSE_STALL_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the last lines may take to be delivered when the server stops.
const STOP_TIMEOUT: Duration = Duration::from_secs(1);
/// Connections from one address or IPv6 /64, if `--max-per-ip` does not say otherwise.
const MAX_PER_IP: usize = 200;

// ---------------------------------------------------------------------------------------------
// 1. The wire: bytes into lines, lines into requests, replies into lines
// ---------------------------------------------------------------------------------------------

const BACKSPACE: u8 = 0x08;
const DELETE: u8 = 0x7f;
/// Whether a byte does more than belong to a line of text. NUL may end it (`Decoder::ends_line`).
const IS_SPECIAL: [bool; 256] = {
    let mut is_special = [false; 256];
    is_special[0] = true;
    is_special[b'\n' as usize] = true;
    is_special[BACKSPACE as usize] = true;
    is_special[DELETE as usize] = true;
    is_special[telnet::COMMAND as usize] = true;
    is_special
};

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
    /// The next byte names an option, which is refused with this command, or not answered.
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
    /// The current line is too long, and the rest of it is thrown away. Holds the last byte of text
    /// that was, so that CR NUL is found.
    skipped: Option<u8>,
    /// `line` has been handed out, and is cleared by the next call.
    handed_out: bool,
}

/// What the decoder found.
#[derive(Debug, PartialEq, Eq)]
enum Decoded<'a> {
    /// A whole line, without its ending; never an empty one.
    Line(&'a [u8]),
    /// The beginning of a line that has just passed `MAX_REQUEST`.
    TooLong(&'a [u8]),
    /// The answer to a telnet command.
    TelnetAnswer([u8; 3]),
}

impl Decoder {
    /// Takes bytes from the front of `input` until something is found or no byte is left.
    fn next(&mut self, input: &mut &[u8]) -> Option<Decoded<'_>> {
        if mem::take(&mut self.handed_out) {
            self.line.clear();
        }
        loop {
            self.take_run(input);
            let (&byte, rest) = input.split_first()?;
            if self.ends_line(byte) {
                *input = rest;
                if self.end_line() {
                    return Some(Decoded::Line(&self.line));
                }
            } else if self.skipped.is_none() && self.has_no_room_for(byte) {
                self.skipped = Some(self.line.last().copied().unwrap_or(0));
                self.handed_out = true;
                return Some(Decoded::TooLong(&self.line));
            } else {
                *input = rest;
                self.received = self.received.saturating_add(1);
                if let Some(answer) = self.take(byte) {
                    return Some(Decoded::TelnetAnswer(answer));
                }
            }
        }
    }

    /// Nearly everything is plain text, and is taken in runs.
    fn take_run(&mut self, input: &mut &[u8]) {
        if self.telnet == Telnet::Text && self.skipped.is_none() {
            let room = MAX_REQUEST.saturating_sub(self.received.into()).min(input.len());
            let run = input.iter().take(room).position(|&byte| IS_SPECIAL[usize::from(byte)]);
            let (text, rest) = input.split_at(run.unwrap_or(room));
            self.line.extend(text);
            self.received += text.len() as u16;
            *input = rest;
        }
    }

    /// Takes a byte that does not end the line; returns the answer to a telnet command.
    fn take(&mut self, byte: u8) -> Option<[u8; 3]> {
        self.telnet = match (self.telnet, byte) {
            (Telnet::Text, telnet::COMMAND) => Telnet::Command,
            (Telnet::Text, BACKSPACE | DELETE) => {
                self.erase();
                Telnet::Text
            }
            (Telnet::Text, _) | (Telnet::Command, telnet::COMMAND) => {
                match &mut self.skipped {
                    Some(skipped) => *skipped = byte,
                    None => self.line.push(byte),
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
                return answer.map(|answer| [telnet::COMMAND, answer, option]);
            }
            (Telnet::Subnegotiation, telnet::COMMAND) => Telnet::SubnegotiationCommand,
            (Telnet::SubnegotiationCommand, telnet::SUBNEGOTIATION_END) => Telnet::Text,
            (Telnet::Subnegotiation | Telnet::SubnegotiationCommand, _) => Telnet::Subnegotiation,
        };
        None
    }

    /// LF ends a line, and so does CR NUL, which is telnet's Enter in character mode (RFC 854).
    fn ends_line(&self, byte: u8) -> bool {
        let last = self.skipped.or(self.line.last().copied());
        self.telnet == Telnet::Text && (byte == b'\n' || byte == 0 && last == Some(b'\r'))
    }

    /// Ends the current line. Returns whether there is one to be handed out.
    fn end_line(&mut self) -> bool {
        self.received = 0;
        if self.line.last() == Some(&b'\r') {
            self.line.pop();
        }
        self.handed_out = self.skipped.take().is_none() && !self.line.is_empty();
        self.handed_out
    }

    /// Whether `byte` would make the line too long. A CR may be the start of the line's ending.
    fn has_no_room_for(&self, byte: u8) -> bool {
        let received = usize::from(self.received);
        let may_end = self.telnet == Telnet::Text && byte == b'\r';
        received > MAX_REQUEST || (received == MAX_REQUEST && !may_end)
    }

    /// Takes back the last character: a byte, and before it those that UTF-8 continues with it.
    fn erase(&mut self) {
        while let Some(byte) = self.line.pop() {
            if byte & 0b1100_0000 != 0b1000_0000 {
                break;
            }
        }
    }

    /// Whether nothing of a line is held.
    fn is_between_lines(&self) -> bool {
        self.handed_out || self.line.is_empty()
    }
}

/// Why a request is refused: a code, which is for programs, and a text, which is for people
/// (PROTOCOL.md, "Errors").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Refusal(&'static str, &'static str);

const BAD_NAME: Refusal = Refusal(
    "bad-name",
    "a name has 1 to 50 bytes: letters, digits, _ - . and no spaces; the first is a letter or digit",
);
const BAD_TEXT: Refusal = Refusal(
    "bad-text",
    "lines are UTF-8 without control characters (TAB is fine) or characters that turn the direction",
);
const UNKNOWN_COMMAND: Refusal = Refusal("unknown-command", "no such command; HELP lists them");
const NOT_NAMED: Refusal = Refusal("not-named", "choose a name first: NAME <name>");
const ALREADY_NAMED: Refusal =
    Refusal("already-named", "you have a name, and it cannot be changed");
const NAME_TAKEN: Refusal = Refusal("name-taken", "somebody here has that name; choose another");
const NO_SUCH_USER: Refusal =
    Refusal("no-such-user", "nobody here has that name; LIST tells who is");
const LINE_TOO_LONG: Refusal = Refusal("line-too-long", "a line has at most 4000 bytes");
const NOT_A_PERSON: Refusal = Refusal("usage", "this is linechat, not a web server");
const FULL: Refusal = Refusal("full", "no more connections can be taken now; try again later");
const TIMED_OUT: Refusal = Refusal("timeout", "no name was given in time");

/// A well-formed request, its texts as the client wrote them (PROTOCOL.md, "Requests").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Request<'a> {
    Name(&'a str),
    Msg(&'a str),
    Priv { to: &'a str, text: &'a str },
    List,
    Ping(&'a str),
    Help,
    Quit,
}

/// Who may make a request.
#[derive(Clone, Copy)]
enum Asker {
    Anybody,
    Unnamed,
    Named,
}

/// A verb: who may use it, how its argument is understood (nothing if it is used wrongly), and the
/// line that begins with its word and explains it, in HELP and in `ERR usage`.
type Verb = (Asker, for<'a> fn(&'a str) -> Option<Request<'a>>, &'static str);

const VERBS: [Verb; 7] = [
    (Unnamed, |it| given(it).map(Request::Name), "NAME <name> takes a name and enters the room"),
    (Named, |it| given(it).map(Request::Msg), "MSG <text> says something to everybody else"),
    (Named, parse_priv, "PRIV @<name> <text> says something to one person alone"),
    (Named, |it| without(it, Request::List), "LIST tells who is here"),
    (
        Anybody,
        |it| Some(Request::Ping(it)),
        "PING [token] is answered with PONG and the same token",
    ),
    (Anybody, |it| without(it, Request::Help), "HELP shows these lines"),
    (Anybody, |it| without(it, Request::Quit), "QUIT leaves"),
];

fn parse_priv(argument: &str) -> Option<Request<'_>> {
    let (to, text) = argument.strip_prefix('@')?.split_once(' ')?;
    Some(Request::Priv { to: given(to)?, text: given(text)? })
}

fn given(argument: &str) -> Option<&str> {
    (!argument.is_empty()).then_some(argument)
}

/// A request that has no argument other than spaces.
fn without<'a>(argument: &str, request: Request<'a>) -> Option<Request<'a>> {
    argument.bytes().all(|byte| byte == b' ').then_some(request)
}

/// Understands a line. `Server::request` has made the checks that come before, and `Room` makes
/// those that come behind (PROTOCOL.md, "Requests").
fn parse(line: &[u8], is_named: bool) -> Result<Request<'_>, Refusal> {
    let line = std::str::from_utf8(line).map_err(|_| BAD_TEXT)?;
    let is_plain = line.bytes().all(|byte| matches!(byte, b' '..=b'~'));
    if !is_plain && line.chars().any(is_forbidden) {
        return Err(BAD_TEXT);
    }
    let (word, argument) = line.split_once(' ').unwrap_or((line, ""));
    let is_meant = |(.., usage): &&Verb| {
        usage.split(' ').next().is_some_and(|verb| verb.eq_ignore_ascii_case(word))
    };
    let &(asker, understand, usage) = VERBS.iter().find(is_meant).ok_or(UNKNOWN_COMMAND)?;
    match asker {
        Unnamed if is_named => Err(ALREADY_NAMED),
        Named if !is_named => Err(NOT_NAMED),
        _ => understand(argument).ok_or(Refusal("usage", usage)),
    }
}

/// Whether a connection's first line is not a person's: an HTTP request, which a web page can have
/// a browser send anywhere with lines of its own behind it, or a TLS ClientHello, whose first byte
/// is 22 (RFC 8446, section 5.1), and which can hold such lines too.
fn is_foreign(line: &[u8]) -> bool {
    let methods = "GET HEAD POST PUT PATCH DELETE OPTIONS TRACE CONNECT PRI";
    let word = line.split(|&byte| byte == b' ').next().unwrap_or_default();
    let is_method = |method: &str| method.as_bytes().eq_ignore_ascii_case(word);
    line.first() == Some(&22)
        || line.windows(6).any(|bytes| bytes == b" HTTP/")
        || (word.len() < line.len() && methods.split(' ').any(is_method))
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

/// Whether this can be a name (PROTOCOL.md, "Names").
fn is_good_name(name: &str) -> bool {
    let is_first = |c: char| is_letter_or_number(c) && !is_mark(c);
    let is_further = |c: char| is_letter_or_number(c) || is_mark(c) || matches!(c, '_' | '-' | '.');
    name.len() <= MAX_NAME
        && name.starts_with(is_first)
        && name.chars().all(|c| is_further(c) && !is_invisible(c))
}

/// Unicode's categories L and N, and the marks that are Alphabetic. Circled and squared letters are
/// Alphabetic too, but symbols.
fn is_letter_or_number(character: char) -> bool {
    let is_symbol = matches!(character,
        '\u{24b6}'..='\u{24e9}' | '\u{1f130}'..='\u{1f149}' | '\u{1f150}'..='\u{1f169}'
        | '\u{1f170}'..='\u{1f189}');
    (character.is_alphabetic() || character.is_numeric()) && !is_symbol
}

/// The marks that are not Alphabetic, and some that are: Unicode's categories Mn and Me, and five of
/// Mc. The standard library tells the former by how it shows them: a character that extends the one
/// before it (Grapheme_Extend) is escaped at the beginning of a text, and not behind a letter
/// (`str::escape_debug`).
fn is_mark(character: char) -> bool {
    let is_escaped = |text: &str| text.escape_debug().any(|shown| shown == '\\');
    let mut utf8 = [0; 4];
    let alone: &str = character.encode_utf8(&mut utf8);
    let extends = || is_escaped(alone) && !is_escaped(&format!("a{alone}"));
    matches!(character, '\u{f3e}' | '\u{f3f}' | '\u{1ce1}' | '\u{1cf7}' | '\u{abec}')
        || (!character.is_ascii() && extends())
}

/// The letters and marks that show nothing (Default_Ignorable_Code_Point).
fn is_invisible(character: char) -> bool {
    matches!(character,
        '\u{34f}' | '\u{115f}' | '\u{1160}' | '\u{17b4}' | '\u{17b5}' | '\u{180b}'..='\u{180f}'
        | '\u{3164}' | '\u{fe00}'..='\u{fe0f}' | '\u{ffa0}' | '\u{e0100}'..='\u{e01ef}')
}

/// Names that have this in common are the same (PROTOCOL.md, "Names").
fn folded(name: &str) -> Box<str> {
    name.to_lowercase().into()
}

/// Appends one line to `out`: the words, a space between each two, CRLF.
fn put_line(out: &mut Vec<u8>, words: &[&str]) {
    for (position, word) in words.iter().enumerate() {
        if position > 0 {
            out.push(b' ');
        }
        out.extend(word.as_bytes());
    }
    out.extend(b"\r\n");
}

fn line(words: &[&str]) -> Vec<u8> {
    let mut line = Vec::with_capacity(words.iter().map(|word| word.len() + 1).sum::<usize>() + 1);
    put_line(&mut line, words);
    line
}

/// A roster, on as many USERS lines as it takes (PROTOCOL.md, "Joining, leaving, roster").
fn roster<'a>(count: usize, names: impl Iterator<Item = &'a str>) -> Vec<u8> {
    let head = format!("USERS {count}");
    let room = MAX_LINE - b"\r\n".len();
    let mut lines = head.clone().into_bytes();
    let mut length = head.len();
    for name in names {
        if length + 1 + name.len() > room {
            lines.extend(b"\r\n");
            lines.extend(head.as_bytes());
            length = head.len();
        }
        lines.push(b' ');
        lines.extend(name.as_bytes());
        length += 1 + name.len();
    }
    lines.extend(b"\r\n");
    lines
}

/// The roster that follows a join or a leave: none if the room is too large for that. An empty room
/// has nobody to be told.
fn pushed_roster<'a>(count: usize, names: impl Iterator<Item = &'a str>) -> Vec<u8> {
    match count {
        1..=MAX_PUSHED_ROSTER => roster(count, names),
        _ => Vec::new(),
    }
}

// ---------------------------------------------------------------------------------------------
// 2. Delivery: what each client is owed
// ---------------------------------------------------------------------------------------------

/// A connection's place in every table. Used again from the turn after the one in which it is freed,
/// when nothing refers to it any more.
type Id = usize;

/// Values by `Id`.
struct Table<T> {
    places: Vec<Option<T>>,
    count: usize,
}

impl<T> Default for Table<T> {
    fn default() -> Self {
        Table { places: Vec::new(), count: 0 }
    }
}

impl<T> Table<T> {
    fn get(&self, id: Id) -> Option<&T> {
        self.places.get(id)?.as_ref()
    }

    fn get_mut(&mut self, id: Id) -> Option<&mut T> {
        self.places.get_mut(id)?.as_mut()
    }

    fn iter(&self) -> impl Iterator<Item = (Id, &T)> {
        self.places.iter().enumerate().filter_map(|(id, place)| Some((id, place.as_ref()?)))
    }

    /// Puts a value where there is none.
    fn insert(&mut self, id: Id, value: T) {
        if self.places.len() <= id {
            self.places.resize_with(id + 1, || None);
        }
        if let Some(place) = self.places.get_mut(id) {
            *place = Some(value);
            self.count += 1;
        }
    }

    fn remove(&mut self, id: Id) -> Option<T> {
        let value = self.places.get_mut(id)?.take()?;
        self.count -= 1;
        Some(value)
    }
}

/// What everybody is owed (PROTOCOL.md, "Delivery").
///
/// A line for everybody is stored once, in `broadcast`; each person's cursor says how far into it
/// their own outbox already reaches, so they are owed their outbox and then `broadcast[cursor..]`.
/// What must reach one person at its own place among those lines first copies the lines before it
/// into that person's outbox. So what is said is stored once, whatever the size of the room, and
/// copies outlive the turn only for those who do not keep up.
#[derive(Default)]
struct Delivery {
    /// None for a connection that has failed or is closed: what it would be told goes nowhere.
    outboxes: Table<Outbox>,
    /// The lines of this turn that are for everybody in the room.
    broadcast: Vec<u8>,
    /// What this turn has cost beside the lines for everybody: bytes put into single outboxes, each
    /// line at least `MIN_WORK`, and bytes read.
    work: usize,
    /// Bytes of the lines in this turn that somebody has caused for one other client.
    told: usize,
    /// Who is written to at the end of this turn even if nothing is broadcast.
    pending_writes: Vec<Id>,
    /// A line for a single client has brought its backlog over the soft limit in this turn.
    passed_soft_limit: bool,
    /// The last turn was full, or somebody had sent as much as is read at once.
    is_flooded: bool,
    /// In this turn somebody has sent as much as is read at once.
    has_full_read: bool,
}

#[derive(Default)]
struct Outbox {
    bytes: VecDeque<u8>,
    /// How many of the bytes are replies.
    replies: u32,
    is_pending: bool,
    /// In the room: how much of `Delivery::broadcast` need not be sent from there.
    cursor: Option<u32>,
    /// The lengths of what stands in `bytes`, by kind and in order. Nothing while all is of one kind.
    #[allow(clippy::box_collection)]
    runs: Option<Box<VecDeque<(Kind, u32)>>>,
}

/// Replies answer the client's own requests; what others cause for it are events.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Event,
    Reply,
}

impl Outbox {
    fn append(&mut self, kind: Kind, bytes: &[u8]) {
        let (before, length) = (self.bytes.len() as u32, bytes.len() as u32);
        self.bytes.extend(bytes);
        let former = if self.replies > 0 { Kind::Reply } else { Kind::Event };
        match &mut self.runs {
            Some(runs) => match runs.back_mut() {
                Some((last, total)) if *last == kind => *total += length,
                _ => runs.push_back((kind, length)),
            },
            None if before == 0 || former == kind => {}
            None => self.runs = Some(Box::new([(former, before), (kind, length)].into())),
        }
        if kind == Kind::Reply {
            self.replies += length;
        }
    }

    /// Takes so many bytes off the front, which have been delivered.
    fn take(&mut self, length: usize) {
        self.bytes.drain(..length);
        if self.bytes.is_empty() {
            self.bytes = VecDeque::new();
        }
        let mut rest = length as u32;
        let Some(runs) = &mut self.runs else {
            self.replies = self.replies.saturating_sub(rest);
            return;
        };
        while let Some((kind, total)) = runs.front_mut().filter(|_| rest > 0) {
            let taken = rest.min(*total);
            *total -= taken;
            rest -= taken;
            if *kind == Kind::Reply {
                self.replies -= taken;
            }
            if *total == 0 {
                runs.pop_front();
            }
        }
        self.runs.take_if(|runs| runs.len() < 2);
    }

    fn backlog(&self) -> usize {
        self.bytes.len() - self.replies as usize
    }
}

impl Delivery {
    /// Bytes for everybody after which a turn is full.
    const MAX_BROADCAST: usize = 64 * 1024;
    /// The same while `is_flooded`. A write of this size takes the kernel about twice as long as the
    /// smallest, so whoever asks for something else does not wait for long.
    const MAX_BROADCAST_IN_FLOOD: usize = 4 * 1024;
    /// The work after which a turn is full.
    const MAX_WORK: usize = 256 * 1024;
    /// What a line costs at least, however short.
    const MIN_WORK: usize = 64;

    /// Bytes that others have caused for a client and it has not taken.
    fn backlog(&self, id: Id) -> usize {
        self.outboxes.get(id).map_or(0, Outbox::backlog)
    }

    /// Whether so many replies wait for a client that its further requests are to wait too.
    fn is_over_reply_limit(&self, id: Id) -> bool {
        self.outboxes.get(id).is_some_and(|outbox| outbox.replies as usize > REPLY_LIMIT)
    }

    /// Whether the turn is to end, so that everybody else does not wait for long.
    fn is_full(&self) -> bool {
        let max_broadcast = match self.is_flooded {
            true => Self::MAX_BROADCAST_IN_FLOOD,
            false => Self::MAX_BROADCAST,
        };
        self.broadcast.len() >= max_broadcast
            || self.work >= Self::MAX_WORK
            || self.passed_soft_limit
    }

    /// A client receives, or does not receive any more, what is broadcast from now on.
    fn set_in_room(&mut self, id: Id, is_in_room: bool) {
        self.catch_up(id);
        let end = self.broadcast.len() as u32;
        if let Some(outbox) = self.outboxes.get_mut(id) {
            outbox.cursor = is_in_room.then_some(end);
        }
    }

    /// A line that answers a client's request.
    fn reply(&mut self, id: Id, words: &[&str]) {
        self.put(id, Kind::Reply, &line(words));
    }

    /// A line that somebody else has caused for a client.
    fn tell(&mut self, id: Id, words: &[&str]) {
        let (line, was_over) = (line(words), self.backlog(id) > SOFT_LIMIT);
        self.put(id, Kind::Event, &line);
        self.told += line.len();
        self.passed_soft_limit |= !was_over && self.backlog(id) > SOFT_LIMIT;
    }

    /// A line for everybody in the room but one.
    fn broadcast_to_others(&mut self, id: Id, words: &[&str]) {
        self.catch_up(id);
        put_line(&mut self.broadcast, words);
        let end = self.broadcast.len() as u32;
        if let Some(Outbox { cursor: Some(cursor), .. }) = self.outboxes.get_mut(id) {
            *cursor = end;
        }
    }

    /// Appends to one client's outbox, behind what everybody was told before.
    fn put(&mut self, id: Id, kind: Kind, bytes: &[u8]) {
        self.catch_up(id);
        if let Some(outbox) = self.outboxes.get_mut(id) {
            outbox.append(kind, bytes);
            self.work += bytes.len().max(Self::MIN_WORK);
        }
    }

    /// Copies what everybody was told before into one client's outbox, and has that be written at
    /// the end of the turn.
    fn catch_up(&mut self, id: Id) {
        let Some(outbox) = self.outboxes.get_mut(id) else { return };
        if let Some(cursor) = &mut outbox.cursor {
            let fresh = self.broadcast.get(*cursor as usize..).unwrap_or_default();
            *cursor = self.broadcast.len() as u32;
            if !fresh.is_empty() {
                outbox.append(Kind::Event, fresh);
                self.work += fresh.len();
            }
        }
        if !mem::replace(&mut outbox.is_pending, true) {
            self.pending_writes.push(id);
        }
    }

    /// What a client is owed: its outbox, in two pieces, and behind it the lines for everybody.
    fn pending(&self, id: Id) -> Option<[&[u8]; 3]> {
        let Outbox { bytes, cursor, .. } = self.outboxes.get(id)?;
        let (first, second) = bytes.as_slices();
        let fresh = cursor.and_then(|cursor| self.broadcast.get(cursor as usize..));
        Some([first, second, fresh.unwrap_or_default()])
    }

    /// Whether somebody is to be written to.
    fn is_pending(&self) -> bool {
        !self.broadcast.is_empty() || !self.pending_writes.is_empty()
    }

    /// So many bytes of that have been taken; the rest is kept in the outbox. Returns whether that is
    /// empty.
    fn settle(&mut self, id: Id, mut taken: usize) -> bool {
        let Some(outbox) = self.outboxes.get_mut(id) else { return true };
        outbox.is_pending = false;
        let from_outbox = taken.min(outbox.bytes.len());
        outbox.take(from_outbox);
        taken -= from_outbox;
        if let Some(cursor) = &mut outbox.cursor {
            let start = mem::take(cursor) as usize + taken;
            let fresh = self.broadcast.get(start..).unwrap_or_default();
            if !fresh.is_empty() {
                outbox.append(Kind::Event, fresh);
            }
        }
        outbox.bytes.is_empty()
    }

    /// Bytes that requests have caused for others in this turn, each line counted once.
    fn caused(&self) -> usize {
        self.broadcast.len() + self.told
    }

    /// What this turn has cost so far.
    fn effort(&self) -> usize {
        self.broadcast.len() + self.work
    }

    /// Everything of this turn has been written or kept in outboxes.
    fn end_turn(&mut self) {
        self.is_flooded = mem::take(&mut self.has_full_read) || self.is_full();
        self.broadcast.clear();
        (self.work, self.told) = (0, 0);
        self.passed_soft_limit = false;
    }
}

// ---------------------------------------------------------------------------------------------
// 3. The room: who is here, and what each request does
// ---------------------------------------------------------------------------------------------

#[derive(Default)]
struct Room {
    /// Those who have a name.
    people: Table<Person>,
    /// By name, folded.
    by_name: HashMap<Box<str>, Id>,
    /// In the order of joining.
    by_arrival: BTreeMap<u64, Id>,
    delivery: Delivery,
}

struct Person {
    name: Rc<str>,
    arrival: u64,
}

/// How somebody left (PROTOCOL.md, "Joining, leaving, roster").
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

/// What a request did that the loop or the console must know of.
#[derive(Debug, PartialEq, Eq)]
enum Outcome<'a> {
    Nothing,
    Joined,
    /// A public message, for `--verbose`.
    Said(&'a str),
    Quit,
}

impl Room {
    /// A new connection, which is greeted.
    fn connect(&mut self, id: Id) {
        self.delivery.outboxes.insert(id, Outbox::default());
        let greeting = "HELLO linechat/1 choose a name with NAME <name>; HELP shows the rest";
        self.delivery.reply(id, &[greeting]);
    }

    fn name(&self, id: Id) -> Option<Rc<str>> {
        Some(self.people.get(id)?.name.clone())
    }

    fn is_named(&self, id: Id) -> bool {
        self.people.get(id).is_some()
    }

    /// How many people have a name.
    fn count(&self) -> usize {
        self.by_arrival.len()
    }

    fn find(&self, name: &str) -> Option<Id> {
        let is_possible = name.len() <= MAX_NAME;
        is_possible.then(|| self.by_name.get(&folded(name)).copied())?
    }

    /// The names in the order of joining.
    fn names(&self) -> impl Iterator<Item = (Id, &str)> {
        let people = self.by_arrival.values();
        people.filter_map(|&id| Some((id, &*self.people.get(id)?.name)))
    }

    /// The bytes of the lines that a request would cause for others, each line counted once: what
    /// it takes from the budget.
    fn cost(&self, id: Id, request: Request) -> usize {
        match (request, self.people.get(id)) {
            (Request::Name(name), None) if self.check_name(name).is_ok() => {
                let count = self.count() + 1;
                let names = self.names().map(|(_, name)| name).chain([name]);
                line(&["JOINED", name, &count.to_string()]).len()
                    + pushed_roster(count, names).len()
            }
            (Request::Msg(text), Some(from)) => line(&["MSG", &from.name, text]).len(),
            (Request::Priv { to, text }, Some(from)) => match self.find(to) {
                Some(to) if to != id => line(&["PRIV", &from.name, text]).len(),
                _ => 0,
            },
            (Request::Quit, Some(_)) => self.cost_of_leaving(id, Reason::Quit),
            _ => 0,
        }
    }

    /// The same for a leave; nothing for one who has no name.
    fn cost_of_leaving(&self, id: Id, reason: Reason) -> usize {
        let Some(name) = self.name(id) else { return 0 };
        let count = self.count() - 1;
        let names = self.names().filter(|&(other, _)| other != id).map(|(_, name)| name);
        line(&["LEFT", &name, &count.to_string(), reason.word()]).len()
            + pushed_roster(count, names).len()
    }

    /// Does what a client asks for.
    fn carry_out<'a>(&mut self, id: Id, request: Request<'a>) -> Outcome<'a> {
        match request {
            Request::Name(name) => match self.check_name(name) {
                Ok(()) => {
                    self.join(id, name);
                    return Outcome::Joined;
                }
                Err(refusal) => self.refuse(id, refusal),
            },
            Request::Msg(text) => {
                if let Some(from) = self.name(id) {
                    self.delivery.broadcast_to_others(id, &["MSG", &from, text]);
                    return Outcome::Said(text);
                }
            }
            Request::Priv { to, text } => self.whisper(id, to, text),
            Request::List => {
                let lines = roster(self.count(), self.names().map(|(_, name)| name));
                self.delivery.put(id, Kind::Reply, &lines);
            }
            Request::Ping("") => self.delivery.reply(id, &["PONG"]),
            Request::Ping(token) => self.delivery.reply(id, &["PONG", token]),
            Request::Help => {
                VERBS.iter().for_each(|(.., help)| self.delivery.reply(id, &["HELP", help]))
            }
            Request::Quit => {
                self.delivery.reply(id, &["BYE see you"]);
                return Outcome::Quit;
            }
        }
        Outcome::Nothing
    }

    fn refuse(&mut self, id: Id, Refusal(code, text): Refusal) {
        self.delivery.reply(id, &["ERR", code, text]);
    }

    fn check_name(&self, name: &str) -> Result<(), Refusal> {
        match is_good_name(name) {
            false => Err(BAD_NAME),
            true if self.find(name).is_some() => Err(NAME_TAKEN),
            true => Ok(()),
        }
    }

    fn join(&mut self, id: Id, name: &str) {
        let arrival = self.by_arrival.last_key_value().map_or(0, |(last, _)| last + 1);
        self.by_name.insert(folded(name), id);
        self.by_arrival.insert(arrival, id);
        self.people.insert(id, Person { name: name.into(), arrival });
        let count = self.count().to_string();
        self.delivery.set_in_room(id, true);
        self.delivery.reply(id, &["WELCOME", name, &count]);
        self.delivery.broadcast_to_others(id, &["JOINED", name, &count]);
        self.push_roster();
    }

    fn whisper(&mut self, id: Id, to: &str, text: &str) {
        let recipient = self.find(to).and_then(|to| Some((to, self.name(to)?)));
        let (Some((to, to_name)), Some(from)) = (recipient, self.name(id)) else {
            return self.refuse(id, NO_SUCH_USER);
        };
        match to == id {
            true => self.delivery.reply(id, &["PRIV", &from, text]),
            false => self.delivery.tell(to, &["PRIV", &from, text]),
        }
        self.delivery.reply(id, &["SENT", &to_name, text]);
    }

    /// Takes a person out of the room and says so to the others. Returns the name, if there was
    /// one; what the client is owed stays in its outbox.
    fn leave(&mut self, id: Id, reason: Reason) -> Option<Rc<str>> {
        let Person { name, arrival } = self.people.remove(id)?;
        self.delivery.set_in_room(id, false);
        self.by_name.remove(&folded(&name));
        self.by_arrival.remove(&arrival);
        let count = self.count().to_string();
        put_line(&mut self.delivery.broadcast, &["LEFT", &name, &count, reason.word()]);
        self.push_roster();
        Some(name)
    }

    fn push_roster(&mut self) {
        let lines = pushed_roster(self.count(), self.names().map(|(_, name)| name));
        self.delivery.broadcast.extend(lines);
    }
}

// ---------------------------------------------------------------------------------------------
// 4. Flow control: whose request goes on, and when, while somebody cannot keep up
// ---------------------------------------------------------------------------------------------

/// Who is served next: fair queueing, smallest finish first. What somebody asks for finishes its cost
/// behind where their last finished or where the queue stands, whichever is later; the queue moves on
/// by what is served, divided among those who wait. So who asks for little is served before who asks
/// for much, whoever is new starts level with the others, and nobody is passed for ever (WF2Q+ by
/// Bennett and Zhang, with equal weights and without its test of eligibility).
#[derive(Default)]
struct FairQueue {
    /// By expected finish, in units of `1 / SCALE` byte; with the expected cost, in bytes.
    waiting: BTreeMap<(u128, Id), usize>,
    /// As long as anybody waits: the expected finish of each who does, and the last of the others.
    finishes: BTreeMap<Id, u128>,
    /// Where the queue stands.
    position: u128,
}

impl FairQueue {
    const SCALE: u128 = 1 << 16;

    /// One waits, unless they do already.
    fn push(&mut self, id: Id, expected_cost: usize) {
        let last = self.finishes.get(&id).copied().unwrap_or(0);
        if !self.waiting.contains_key(&(last, id)) {
            let finish = last.max(self.position) + expected_cost as u128 * Self::SCALE;
            self.waiting.insert((finish, id), expected_cost);
            self.finishes.insert(id, finish);
        }
    }

    /// Who is next, and the expected cost.
    fn first(&self) -> Option<(Id, usize)> {
        self.waiting.first_key_value().map(|(&(_, id), &cost)| (id, cost))
    }

    /// Takes out who is next. Then `charge` is to be told what serving them has cost.
    fn pop(&mut self) -> Option<Id> {
        let ((finish, id), expected_cost) = self.waiting.pop_first()?;
        self.finishes.insert(id, finish - expected_cost as u128 * Self::SCALE);
        Some(id)
    }

    fn charge(&mut self, id: Id, cost: usize) {
        let cost = cost as u128 * Self::SCALE;
        self.position += cost / (self.waiting.len() as u128 + 1);
        if let Some(finish) = self.finishes.get_mut(&id) {
            *finish += cost;
        }
        self.forget_if_idle();
    }

    /// One waits no more.
    fn remove(&mut self, id: Id) {
        if let Some(finish) = self.finishes.remove(&id) {
            self.waiting.remove(&(finish, id));
        }
        self.forget_if_idle();
    }

    /// When nobody waits, all start level again.
    fn forget_if_idle(&mut self) {
        if self.waiting.is_empty() {
            self.finishes.clear();
        }
    }
}

/// The budget for what requests cause for others, and who waits for it (PROTOCOL.md, "Delivery").
///
/// The budget applies while somebody is over the soft limit. It is a token bucket, kept as one
/// point in time: `paid_until`, to which spending adds and which may lie one full bucket ahead.
struct Flow {
    over_soft_limit: BTreeSet<Id>,
    paid_until: Instant,
    /// Each client waits with one request, which costs the bytes that it causes for others.
    queue: FairQueue,
    /// When the bucket last held too little for the next one: nobody goes on before this.
    next_batch: Instant,
}

impl Flow {
    /// Requests go on in batches so far apart, because each batch costs a write to everybody.
    const BATCH_INTERVAL: Duration = Duration::from_millis(20);

    fn new(now: Instant) -> Self {
        Flow {
            over_soft_limit: BTreeSet::new(),
            paid_until: now,
            queue: FairQueue::default(),
            next_batch: now,
        }
    }

    /// Whether requests that cause something for others are limited now.
    fn applies(&self) -> bool {
        !self.over_soft_limit.is_empty()
    }

    fn set_over_soft_limit(&mut self, id: Id, is_over: bool) {
        match is_over {
            true => self.over_soft_limit.insert(id),
            false => self.over_soft_limit.remove(&id),
        };
    }

    /// Whether a request that causes so many bytes for others may go on now. If not, its client
    /// waits until `next` returns it.
    fn admit(&mut self, id: Id, cost: usize, now: Instant) -> bool {
        if !self.applies() || cost == 0 {
            return true;
        }
        self.queue.push(id, cost);
        self.queue.first() == Some((id, cost)) && self.next(now).is_some()
    }

    /// Takes the next client out of the queue whose request may go on now.
    fn next(&mut self, now: Instant) -> Option<Id> {
        let (id, cost) = self.queue.first()?;
        if self.applies() {
            if now < self.next_batch {
                return None;
            }
            if self.paid_until.max(now) + time_for(cost) > now + time_for(BUDGET) {
                self.next_batch = now + Self::BATCH_INTERVAL;
                return None;
            }
        }
        self.queue.pop();
        self.queue.charge(id, cost);
        Some(id)
    }

    /// A request has caused so many bytes for others: more or less than was expected, if the room has
    /// changed while it waited.
    fn spend(&mut self, bytes: usize, now: Instant) {
        if self.applies() {
            self.paid_until = self.paid_until.max(now) + time_for(bytes);
        }
    }

    /// When `next` is to be asked again.
    fn next_time(&self, now: Instant) -> Option<Instant> {
        let next = if self.applies() { self.next_batch } else { now };
        self.queue.first().map(|_| next)
    }

    /// A client waits no more, and is not over the soft limit.
    fn forget(&mut self, id: Id) {
        self.over_soft_limit.remove(&id);
        self.queue.remove(id);
    }
}

/// The time in which the budget allows so many bytes.
fn time_for(bytes: usize) -> Duration {
    Duration::from_secs(1) * bytes as u32 / BUDGET as u32
}

// ---------------------------------------------------------------------------------------------
// 5. A connection: its socket and its states
// ---------------------------------------------------------------------------------------------

/// While it waits, it stands in `Flow::queue`; while it is open and can be written to, it has an outbox
/// in `Delivery`; and every deadline of its phase stands in `Server::deadlines`.
struct Connection {
    /// Nothing once nothing more is to be read or written (`Phase::Gone`).
    socket: Option<os::Socket>,
    address: SocketAddr,
    phase: Phase,
    input: Input,
    waiting: Waiting,
    decoder: Decoder,
    /// Read, but not looked at: the turn was full, or a request of this connection waits.
    unread: Box<[u8]>,
    /// What the poller has been asked to report.
    interest: Interest,
    /// The socket takes nothing now; write again when it is ready.
    is_blocked: bool,
    /// It has sent a line that is not empty.
    has_spoken: bool,
}

/// States of a connection (PROTOCOL.md, "States of a connection"), each with the times at which
/// patience ends.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// Connected, or in the room. Without a name, it must have one by then; with one, there is a
    /// deadline only while it is over the soft limit, by which it must take something.
    Open { deadline: Option<Instant> },
    /// What it is owed is being delivered; nothing that it sends counts any more.
    Closing { stalled_by: Instant, closed_by: Instant },
    /// Everything is delivered and the stream ended on our side. Closing the socket now could
    /// reset the connection, and so destroy the last lines, if the peer still sends something
    /// (RFC 1122, section 4.2.2.13); so the peer's end is awaited.
    Finished { closed_by: Instant },
    /// The socket is closed; its leaving is still to be announced.
    Gone,
}

impl Phase {
    fn deadline(self) -> Option<Instant> {
        match self {
            Phase::Open { deadline } => deadline,
            Phase::Closing { stalled_by, closed_by } => Some(stalled_by.min(closed_by)),
            Phase::Finished { closed_by } => Some(closed_by),
            Phase::Gone => None,
        }
    }
}

/// What there still is to be read from a connection.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Input {
    /// Read when the poller reports it.
    Flowing,
    /// The connection has failed, but what the peer had sent before can be read. The poller, which
    /// would report the failure for ever, has been told to forget it.
    Failed,
    /// The peer has ended its side.
    Ended,
}

/// What a connection waits with for the budget.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Waiting {
    Nothing,
    /// The line that its decoder handed out last.
    Request,
    Leave(Reason),
}

/// Which readiness the poller is asked to report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Interest {
    read: bool,
    write: bool,
}

const READ: Interest = Interest { read: true, write: false };

/// One socket's readiness. A failure counts as both of the others: the next read or write returns the
/// error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Readiness {
    token: usize,
    readable: bool,
    writable: bool,
    failed: bool,
}

impl Connection {
    fn new(socket: os::Socket, address: SocketAddr, name_by: Instant) -> Self {
        Connection {
            socket: Some(socket),
            address,
            phase: Phase::Open { deadline: Some(name_by) },
            input: Input::Flowing,
            waiting: Waiting::Nothing,
            decoder: Decoder::default(),
            unread: Box::default(),
            interest: READ,
            is_blocked: false,
            has_spoken: false,
        }
    }

    fn is_open(&self) -> bool {
        matches!(self.phase, Phase::Open { .. })
    }

    /// Reads once. The end of the stream is `Ok(Some(0))`, nothing now `Ok(None)`; after a failure
    /// there is nothing to wait for, and that is an error.
    fn read(&mut self, into: &mut [u8]) -> io::Result<Option<usize>> {
        let Some(socket) = &mut self.socket else { return Ok(None) };
        match socket.read(into) {
            Err(error) if is_not_ready(&error) && self.input == Input::Flowing => Ok(None),
            result => result.map(Some),
        }
    }

    /// Writes once what is pending. Returns how much was taken.
    fn write(&mut self, pending: [&[u8]; 3]) -> io::Result<usize> {
        let length = pending.iter().map(|piece| piece.len()).sum();
        let Some(socket) = self.socket.as_mut().filter(|_| length > 0 && !self.is_blocked) else {
            return Ok(0);
        };
        let written = match pending {
            [one, [], []] | [[], [], one] => socket.write(one),
            pending => socket.write_vectored(&pending.map(IoSlice::new)),
        };
        let taken = match written {
            Err(error) if is_not_ready(&error) => 0,
            written => written?,
        };
        self.is_blocked = taken < length;
        Ok(taken)
    }
}

/// Whether a call on a socket is only to be tried again when the socket is ready.
fn is_not_ready(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
}

/// Whose connections `--max-per-ip` counts together: an IPv4 address, or an IPv6 network of 64
/// bits, all of whose addresses one machine can use (RFC 7421).
fn host(address: SocketAddr) -> IpAddr {
    match address.ip().to_canonical() {
        IpAddr::V6(ip) => IpAddr::V6(Ipv6Addr::from_bits(ip.to_bits() & (!0 << 64))),
        ip => ip,
    }
}

// ---------------------------------------------------------------------------------------------
// 6. The loop
// ---------------------------------------------------------------------------------------------

/// Tokens that are not a connection's.
const LISTENER: usize = usize::MAX;
const SIGNALS: usize = usize::MAX - 1;

/// What the person running the server asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Signal {
    Stop,
    /// One line on the console about how things are.
    #[cfg_attr(windows, allow(dead_code))]
    Status,
}

struct Server {
    options: Options,
    poller: os::Poller,
    listener: os::Listener,
    signals: os::Signals,
    room: Room,
    flow: Flow,
    connections: Table<Connection>,
    /// Places without a connection: free, and freed in this turn.
    vacant: Vec<Id>,
    vacated: Vec<Id>,
    /// How many connections there are from each host.
    hosts: HashMap<IpAddr, usize>,
    /// Every connection's deadline, the next first.
    deadlines: BTreeSet<(Instant, Id)>,
    /// Who has something to read, or requests left over from the last turn.
    to_serve: FairQueue,
    ready: Vec<Readiness>,
    /// What has just been read, of whichever connection.
    scratch: Vec<u8>,
    /// Given up to accept and refuse one more when descriptors have run out.
    reserve: Option<os::Reserve>,
    /// The listener is left alone until then.
    accept_again: Option<Instant>,
    /// When the budget applied last, if the console was told that it does.
    last_limited: Option<Instant>,
    is_asked_to_stop: bool,
    /// The server is stopping, and waits until then for the last lines to be delivered.
    stop_by: Option<Instant>,
    /// The time of this turn.
    now: Instant,
    console: Console,
}

impl Server {
    /// Bytes read from one connection at once.
    const READ_SHARE: usize = 16 * 1024;
    /// Connections accepted in one turn.
    const ACCEPT_SHARE: usize = 512;
    /// How long the listener is left alone after an accept has failed for a reason that may last.
    const ACCEPT_PAUSE: Duration = Duration::from_millis(250);
    /// After so long without anybody over the soft limit the console is told so.
    const LIMIT_PAUSE: Duration = Duration::from_secs(10);

    fn new(
        options: Options,
        listener: os::Listener,
        signals: os::Signals,
        console: Console,
    ) -> io::Result<Self> {
        let mut poller = os::Poller::new()?;
        poller.add(&listener, LISTENER, READ)?;
        poller.add(&signals, SIGNALS, READ)?;
        let now = os::now();
        Ok(Server {
            options,
            poller,
            listener,
            signals,
            room: Room::default(),
            flow: Flow::new(now),
            connections: Table::default(),
            vacant: Vec::new(),
            vacated: Vec::new(),
            hosts: HashMap::new(),
            deadlines: BTreeSet::new(),
            to_serve: FairQueue::default(),
            ready: Vec::new(),
            scratch: vec![0; Self::READ_SHARE],
            reserve: os::reserve_descriptor(),
            accept_again: None,
            last_limited: None,
            is_asked_to_stop: false,
            stop_by: None,
            now,
            console,
        })
    }

    /// One turn of the loop. Fails only if the poller does.
    fn turn(&mut self) -> io::Result<()> {
        let mut ready = mem::take(&mut self.ready);
        self.poller.wait(&mut ready, self.time_until_next_deadline())?;
        self.now = os::now();
        let mut is_called = false;
        for readiness in ready.drain(..) {
            match readiness.token {
                LISTENER => is_called = true,
                SIGNALS => self.obey(),
                _ => self.note_readiness(readiness),
            }
        }
        self.ready = ready;
        if is_called {
            self.accept();
        }
        self.carry_out_waiting();
        self.serve_all();
        self.flush();
        self.note_budget();
        // What somebody has taken in this turn counts.
        self.expire();
        if mem::take(&mut self.is_asked_to_stop) {
            self.stop();
        }
        self.vacant.append(&mut self.vacated);
        Ok(())
    }

    /// What the poller has reported of a connection.
    fn note_readiness(&mut self, readiness: Readiness) {
        let id = readiness.token;
        let Some(connection) = self.connections.get_mut(id) else { return };
        if readiness.writable && mem::take(&mut connection.is_blocked) {
            self.room.delivery.catch_up(id);
        }
        if readiness.readable && connection.interest.read {
            self.to_serve.push(id, 0);
        } else if readiness.failed {
            self.fail(id);
        }
    }

    // Arriving

    fn accept(&mut self) {
        for _ in 0..Self::ACCEPT_SHARE {
            match self.listener.accept() {
                // A failure to set the socket up mostly means that the peer is gone already.
                Ok((socket, address)) => {
                    let _ = self.add_connection(socket, address);
                }
                Err(error) => match error.kind() {
                    ErrorKind::WouldBlock => return,
                    ErrorKind::ConnectionAborted
                    | ErrorKind::ConnectionReset
                    | ErrorKind::Interrupted => {}
                    _ if os::is_out_of_descriptors(&error) => {
                        return self.accept_without_descriptor()
                    }
                    _ => return self.pause_accepting(),
                },
            }
        }
    }

    /// No descriptor is left: one that only awaits its peer's end gives up its own, else the
    /// reserve serves to turn one newcomer away.
    fn accept_without_descriptor(&mut self) {
        if self.drop_finished(None) {
            return;
        }
        if self.reserve.take().is_none() {
            return self.pause_accepting();
        }
        if let Ok((socket, address)) = self.listener.accept() {
            self.turn_away(socket, address, "no descriptors");
        }
        self.reserve = os::reserve_descriptor();
    }

    fn add_connection(&mut self, socket: os::Socket, address: SocketAddr) -> io::Result<()> {
        let address = SocketAddr::new(address.ip().to_canonical(), address.port());
        let host = host(address);
        let is_own = || {
            address.ip().is_loopback()
                || socket.local_addr().is_ok_and(|own| own.ip().to_canonical() == address.ip())
        };
        let max_from_there = match self.options.max_per_ip {
            Some(0) => usize::MAX,
            Some(max) => max as usize,
            None if is_own() => usize::MAX,
            None => MAX_PER_IP,
        };
        let from_there = |server: &Self| server.hosts.get(&host).copied().unwrap_or(0);
        if from_there(self) >= max_from_there && !self.drop_finished(Some(host)) {
            self.turn_away(socket, address, "too many from there");
            return Ok(());
        }
        if self.connections.count >= self.options.max_clients && !self.drop_finished(None) {
            self.turn_away(socket, address, "full");
            return Ok(());
        }
        socket.set_nonblocking(true)?;
        // Each turn's lines are written at once, so there is nothing to wait for and combine.
        socket.set_nodelay(true)?;
        os::prepare(&socket);
        let id = self.vacant.last().copied().unwrap_or(self.connections.places.len());
        self.poller.add(&socket, id, READ)?;
        let connection = Connection::new(socket, address, self.now + self.options.name_timeout);
        self.deadlines.extend(connection.phase.deadline().map(|deadline| (deadline, id)));
        self.connections.insert(id, connection);
        self.vacant.pop();
        *self.hosts.entry(host).or_default() += 1;
        self.room.connect(id);
        self.console.log(format_args!("{address} connected"));
        Ok(())
    }

    /// Tells one too many so, and closes. What it has sent is read first, for the reason given at
    /// `Phase::Finished`; but nothing is awaited, because this must not use up descriptors.
    fn turn_away(&mut self, mut socket: os::Socket, address: SocketAddr, why: &str) {
        let refusal = line(&["ERR", FULL.0, FULL.1]);
        if socket.set_nonblocking(true).is_ok() && socket.write(&refusal).is_ok() {
            let _ = socket.shutdown(Shutdown::Write);
            let _ = socket.read(&mut self.scratch);
        }
        let (ip, port) = (address.ip().to_canonical(), address.port());
        self.console.log(format_args!("{} refused ({why})", SocketAddr::new(ip, port)));
    }

    /// Leaves the listener alone for a while, so that a lasting failure does not spin.
    fn pause_accepting(&mut self) {
        self.accept_again = Some(self.now + Self::ACCEPT_PAUSE);
        let _ = self.poller.delete(&self.listener, LISTENER);
    }

    // Reading

    /// Carries out the requests and leaves that have waited for the budget, as far as it goes.
    fn carry_out_waiting(&mut self) {
        while !self.room.delivery.is_full() {
            let Some(id) = self.flow.next(self.now) else { return };
            let Some(connection) = self.connections.get_mut(id) else { continue };
            match mem::replace(&mut connection.waiting, Waiting::Nothing) {
                Waiting::Request => {
                    let line = mem::take(&mut connection.decoder.line);
                    self.carry_out(id, &line);
                }
                Waiting::Leave(reason) => self.leave(id, reason),
                Waiting::Nothing => {}
            }
            // What it has sent behind that line takes its turn among the others.
            if self.connections.get(id).is_some() {
                self.to_serve.push(id, 0);
            }
        }
    }

    /// Serves one connection after the other, until the turn is full.
    fn serve_all(&mut self) {
        while !self.room.delivery.is_full() {
            let Some(id) = self.to_serve.pop() else { return };
            self.serve(id);
        }
    }

    /// Whether a connection's next request can be carried out: it is open, and no other request waits,
    /// nor too many replies.
    fn takes_requests(&self, id: Id) -> bool {
        let is_ready = |it: &Connection| it.is_open() && it.waiting == Waiting::Nothing;
        self.connections.get(id).is_some_and(is_ready)
            && !self.room.delivery.is_over_reply_limit(id)
    }

    /// Looks at what a connection has sent: first at what has been read, then at what can be.
    fn serve(&mut self, id: Id) {
        let before = self.room.delivery.effort();
        let Some(connection) = self.connections.get_mut(id) else { return };
        let unread = mem::take(&mut connection.unread);
        if !unread.is_empty() {
            self.digest(id, &unread);
        }
        self.read(id);
        let effort = self.room.delivery.effort() - before;
        self.to_serve.charge(id, effort);
        if self.connections.get(id).is_some_and(Connection::is_open) {
            self.serve_rest(id, effort);
            self.update_interest(id);
        }
    }

    /// Queues a connection again, which is expected to cost so much, if what it has sent waits only for
    /// that. The poller no longer reports one that has failed: it is read until nothing is left.
    fn serve_rest(&mut self, id: Id, expected_effort: usize) {
        let has_more = |it: &Connection| !it.unread.is_empty() || it.input == Input::Failed;
        if self.connections.get(id).is_some_and(has_more) && self.takes_requests(id) {
            self.to_serve.push(id, expected_effort);
        }
    }

    /// Reads what can be carried out next, or is thrown away.
    fn read(&mut self, id: Id) {
        let takes_requests = self.takes_requests(id);
        let Some(connection) = self.connections.get_mut(id) else { return };
        let is_of_use = takes_requests && connection.unread.is_empty() || !connection.is_open();
        if !is_of_use || connection.input == Input::Ended {
            return;
        }
        let mut scratch = mem::take(&mut self.scratch);
        match connection.read(&mut scratch) {
            Ok(None) => {}
            Ok(Some(0)) => self.end_of_input(id),
            Ok(Some(length)) => {
                self.room.delivery.work += length;
                let is_full = connection.is_open() && length == Self::READ_SHARE;
                self.room.delivery.has_full_read |= is_full;
                self.digest(id, scratch.get(..length).unwrap_or_default());
            }
            Err(_) => self.give_up(id, Reason::Disconnected),
        }
        self.scratch = scratch;
    }

    /// Carries out what a connection has sent, line by line, until the turn is full or it must wait
    /// for its replies or for the budget; the rest is kept. Of one that is closing it is thrown away.
    fn digest(&mut self, id: Id, mut input: &[u8]) {
        let Some(connection) = self.connections.get_mut(id) else { return };
        let mut decoder = mem::take(&mut connection.decoder);
        while self.takes_requests(id) && !self.room.delivery.is_full() {
            match decoder.next(&mut input) {
                Some(Decoded::Line(line)) => self.request(id, line, true),
                Some(Decoded::TooLong(line)) => self.request(id, line, false),
                Some(Decoded::TelnetAnswer(answer)) => {
                    self.room.delivery.put(id, Kind::Reply, &answer);
                }
                None => break,
            }
        }
        let Some(connection) = self.connections.get_mut(id) else { return };
        if decoder.is_between_lines() && connection.waiting == Waiting::Nothing {
            // Nothing is held for one who is idle.
            decoder.line = Vec::new();
        }
        connection.decoder = decoder;
        connection.unread = if connection.is_open() { input.into() } else { Box::default() };
    }

    /// One line from a connection: whole, or the beginning of one that is too long. It is refused,
    /// carried out, or waits for the budget. A first line that is too long may be any protocol's, and
    /// nobody introduces themselves so.
    fn request(&mut self, id: Id, line: &[u8], is_whole: bool) {
        let Some(connection) = self.connections.get_mut(id) else { return };
        let is_first = !mem::replace(&mut connection.has_spoken, true);
        if is_first && (!is_whole || is_foreign(line)) {
            self.room.refuse(id, NOT_A_PERSON);
            return self.leave(id, Reason::Quit);
        }
        if !is_whole {
            return self.room.refuse(id, LINE_TOO_LONG);
        }
        // What it may cost; `carry_out` spends what it did.
        if self.flow.applies() {
            let request = parse(line, self.room.is_named(id));
            let cost = request.map_or(0, |request| self.room.cost(id, request));
            if !self.flow.admit(id, cost, self.now) {
                return self.wait(id, Waiting::Request);
            }
        }
        self.carry_out(id, line);
    }

    fn wait(&mut self, id: Id, waiting: Waiting) {
        if let Some(connection) = self.connections.get_mut(id) {
            connection.waiting = waiting;
        }
    }

    fn carry_out(&mut self, id: Id, line: &[u8]) {
        let Some(address) = self.connections.get(id).map(|connection| connection.address) else {
            return;
        };
        let caused = self.room.delivery.caused();
        let outcome = match parse(line, self.room.is_named(id)) {
            Ok(request) => self.room.carry_out(id, request),
            Err(refusal) => return self.room.refuse(id, refusal),
        };
        self.flow.spend(self.room.delivery.caused() - caused, self.now);
        match outcome {
            Outcome::Joined => {
                self.set_phase(id, Phase::Open { deadline: None });
                let name = self.room.name(id).unwrap_or_default();
                let count = self.room.count();
                self.console.log(format_args!("{address} joined as {name}, {count} online"));
            }
            Outcome::Said(text) if self.options.verbose => {
                let name = self.room.name(id).unwrap_or_default();
                self.console.log(format_args!("{address} {name}: {text}"));
            }
            Outcome::Quit => self.leave(id, Reason::Quit),
            Outcome::Said(_) | Outcome::Nothing => {}
        }
    }

    // Writing

    /// Writes to everybody what they are owed, once, and begins the next turn's lines.
    fn flush(&mut self) {
        let pending_writes = mem::take(&mut self.room.delivery.pending_writes);
        match self.room.delivery.broadcast.is_empty() {
            true => pending_writes.into_iter().for_each(|id| self.write(id)),
            false => (0..self.connections.places.len()).for_each(|id| self.write(id)),
        }
        self.room.delivery.end_turn();
    }

    /// Writes to one connection what it is owed, as far as its socket takes it.
    fn write(&mut self, id: Id) {
        let Some(connection) = self.connections.get_mut(id) else { return };
        let delivery = &mut self.room.delivery;
        let Some(pending) = delivery.pending(id) else { return };
        let Ok(taken) = connection.write(pending) else { return self.fail(id) };
        let is_delivered = delivery.settle(id, taken);
        self.after_write(id, taken > 0, is_delivered);
        self.update_interest(id);
    }

    /// What follows from how much a client has taken.
    fn after_write(&mut self, id: Id, has_taken: bool, is_delivered: bool) {
        let Some(connection) = self.connections.get_mut(id) else { return };
        match connection.phase {
            Phase::Open { deadline } => {
                let backlog = self.room.delivery.backlog(id);
                let is_over = backlog > SOFT_LIMIT;
                let was_over = self.flow.over_soft_limit.contains(&id);
                if is_over || was_over {
                    self.flow.set_over_soft_limit(id, is_over);
                    let stalled_by = deadline.filter(|_| was_over && !has_taken);
                    // Not the beginning of this turn: what counts is when something was taken.
                    let stalled_by = stalled_by.unwrap_or_else(|| os::now() + STALL_TIMEOUT);
                    let deadline = is_over.then_some(stalled_by);
                    self.set_phase(id, Phase::Open { deadline });
                    self.note_backlog(id, backlog);
                }
                // If replies have been taken, what waited for that goes on: to ask for as many again.
                self.serve_rest(id, REPLY_LIMIT);
            }
            Phase::Closing { .. } if is_delivered && connection.input == Input::Ended => {
                self.free(id)
            }
            Phase::Closing { .. } if is_delivered => {
                if let Some(socket) = &connection.socket {
                    let _ = socket.shutdown(Shutdown::Write);
                }
                self.set_phase(id, Phase::Finished { closed_by: self.now + CLOSE_STALL_TIMEOUT });
            }
            Phase::Closing { closed_by, .. } if has_taken => {
                let stalled_by = self.now + CLOSE_STALL_TIMEOUT;
                self.set_phase(id, Phase::Closing { stalled_by, closed_by });
            }
            Phase::Closing { .. } | Phase::Finished { .. } | Phase::Gone => {}
        }
    }

    /// Says for whose sake the budget begins to apply. Who is past the hard limit is removed.
    fn note_backlog(&mut self, id: Id, backlog: usize) {
        if self.flow.applies() && self.last_limited.is_none() {
            self.last_limited = Some(self.now);
            let (name, backlog) = (self.room.name(id).unwrap_or_default(), backlog >> 10);
            self.console.log(format_args!(
                "the budget begins to apply: {name} has not taken {backlog} KiB"
            ));
        }
        if backlog > HARD_LIMIT {
            self.give_up(id, Reason::Slow);
        }
    }

    /// Notes when the budget applied last.
    fn note_budget(&mut self) {
        let is_over = |last| self.now >= last + Self::LIMIT_PAUSE;
        if self.flow.applies() {
            self.last_limited = Some(self.now);
        } else if self.last_limited.is_some_and(is_over) {
            self.last_limited = None;
            self.console.log(format_args!("the budget ceases to apply"));
        }
    }

    /// Asks the poller for just what the connection's state can make use of.
    fn update_interest(&mut self, id: Id) {
        let takes_requests = self.takes_requests(id);
        let Some(connection) = self.connections.get_mut(id) else { return };
        let read = connection.input == Input::Flowing && (takes_requests || !connection.is_open());
        let interest = Interest { read, write: connection.is_blocked };
        let Some(socket) = &connection.socket else { return };
        if connection.input != Input::Failed
            && mem::replace(&mut connection.interest, interest) != interest
            && self.poller.modify(socket, id, interest).is_err()
        {
            self.fail(id);
        }
    }

    // Leaving:
    //
    //     end_of_input, open ─── depart ─── (budget) ─── leave ─── drain ─── after_write ─── free
    //     QUIT, a line that closes ─── leave ─── drain ─── after_write: Finished
    //         Finished ─── end_of_input, time_out or drop_finished ─── free
    //     fail ─── read to its end ─── end_of_input, as above; to an error ─── give_up
    //     give_up, open ─── close ─── (next turn, budget) ─── leave ─── free

    /// The client's stream has ended. A line that is unfinished is dropped with its decoder.
    fn end_of_input(&mut self, id: Id) {
        let Some(connection) = self.connections.get_mut(id) else { return };
        connection.input = Input::Ended;
        match connection.phase {
            Phase::Open { .. } => self.depart(id),
            Phase::Closing { .. } => self.room.delivery.catch_up(id),
            Phase::Finished { .. } | Phase::Gone => self.free(id),
        }
    }

    /// The connection has failed, or nothing can be written any more. What its peer had sent before
    /// counts, and is read in time.
    fn fail(&mut self, id: Id) {
        let Some(connection) = self.connections.get_mut(id) else { return };
        if !connection.is_open() || connection.input == Input::Ended {
            return self.give_up(id, Reason::Disconnected);
        }
        connection.input = Input::Failed;
        if let Some(socket) = &connection.socket {
            let _ = self.poller.delete(socket, id);
        }
        self.room.delivery.outboxes.remove(id);
        self.flow.set_over_soft_limit(id, false);
        if self.room.is_named(id) {
            self.set_phase(id, Phase::Open { deadline: None });
        }
        self.to_serve.push(id, 0);
    }

    /// Leaving is a request like any other, and the last one: it may have to wait for the budget.
    fn depart(&mut self, id: Id) {
        let reason = Reason::Disconnected;
        let cost = if self.flow.applies() { self.room.cost_of_leaving(id, reason) } else { 0 };
        match self.flow.admit(id, cost, self.now) {
            true => self.leave(id, reason),
            false => self.wait(id, Waiting::Leave(reason)),
        }
    }

    /// Closes a connection at once, whatever it is owed and has sent. Its leaving waits until the
    /// next turn in any case, because the lines of this one may be on their way.
    fn give_up(&mut self, id: Id, reason: Reason) {
        let Some(connection) = self.connections.get(id).filter(|it| it.is_open()) else {
            return self.free(id);
        };
        // One that is leaving already keeps its place in the queue.
        let is_leaving = matches!(connection.waiting, Waiting::Leave(_));
        self.close(id);
        if !is_leaving {
            self.flow.queue.remove(id);
            self.flow.queue.push(id, self.room.cost_of_leaving(id, reason));
        }
        self.wait(id, Waiting::Leave(reason));
    }

    /// Takes a client out of the room and says so; then it is only delivered what it is owed, or freed
    /// if its socket is closed.
    fn leave(&mut self, id: Id, reason: Reason) {
        let Some(connection) = self.connections.get_mut(id) else { return };
        let (address, is_open) = (connection.address, connection.is_open());
        let caused = self.room.delivery.caused();
        let name = self.room.leave(id, reason);
        self.flow.spend(self.room.delivery.caused() - caused, self.now);
        match name {
            Some(name) => {
                let (reason, count) = (reason.word(), self.room.count());
                self.console.log(format_args!("{address} {name} left ({reason}), {count} online"));
            }
            None => self.console.log(format_args!("{address} disconnected")),
        }
        match is_open {
            true => self.drain(id),
            false => self.free(id),
        }
    }

    /// Ends a connection as soon as it has been delivered what it is owed.
    fn drain(&mut self, id: Id) {
        let Some(connection) = self.connections.get_mut(id) else { return };
        connection.unread = Box::default();
        self.flow.forget(id);
        if self.room.delivery.outboxes.get(id).is_none() {
            return self.free(id);
        }
        self.room.delivery.catch_up(id);
        let stalled_by = self.now + CLOSE_STALL_TIMEOUT;
        self.set_phase(id, Phase::Closing { stalled_by, closed_by: self.now + CLOSE_TIMEOUT });
    }

    /// Closes the socket, and forgets what was on its way in either direction.
    fn close(&mut self, id: Id) {
        self.set_phase(id, Phase::Gone);
        let Some(connection) = self.connections.get_mut(id) else { return };
        if let Some(socket) = connection.socket.take() {
            let _ = self.poller.delete(&socket, id);
        }
        connection.decoder = Decoder::default();
        connection.unread = Box::default();
        self.flow.set_over_soft_limit(id, false);
        self.room.delivery.outboxes.remove(id);
    }

    /// Ends a connection that is no longer in the room, and frees its place.
    fn free(&mut self, id: Id) {
        self.close(id);
        self.flow.forget(id);
        self.to_serve.remove(id);
        let Some(connection) = self.connections.remove(id) else { return };
        self.vacated.push(id);
        let host = host(connection.address);
        if let Some(count) = self.hosts.get_mut(&host) {
            *count -= 1;
            if *count == 0 {
                self.hosts.remove(&host);
            }
        }
    }

    /// Frees the connection that has waited longest only for its peer's end, of all or of a host's.
    /// Returns whether there was one.
    fn drop_finished(&mut self, of: Option<IpAddr>) -> bool {
        let finished = self.connections.iter().filter_map(|(id, connection)| {
            let is_counted = of.is_none_or(|of| of == host(connection.address));
            match connection.phase {
                Phase::Finished { closed_by } if is_counted => Some((closed_by, id)),
                _ => None,
            }
        });
        let Some((_, id)) = finished.min() else { return false };
        self.free(id);
        true
    }

    // Time

    /// The only way from one phase to another, so that `deadlines` always has the right one.
    fn set_phase(&mut self, id: Id, phase: Phase) {
        let Some(connection) = self.connections.get_mut(id) else { return };
        let before = mem::replace(&mut connection.phase, phase).deadline();
        let after = phase.deadline();
        if before != after {
            before.map(|deadline| self.deadlines.remove(&(deadline, id)));
            after.map(|deadline| self.deadlines.insert((deadline, id)));
        }
    }

    fn time_until_next_deadline(&self) -> Option<Duration> {
        if self.to_serve.first().is_some() || self.room.delivery.is_pending() {
            return Some(Duration::ZERO);
        }
        let now = os::now();
        let deadline = self.deadlines.first().map(|&(deadline, _)| deadline);
        let limited = self.last_limited.filter(|_| !self.flow.applies());
        let limited = limited.map(|last| last + Self::LIMIT_PAUSE);
        let flow = self.flow.next_time(now);
        let next = [deadline, flow, limited, self.accept_again, self.stop_by];
        Some(next.into_iter().flatten().min()?.saturating_duration_since(now))
    }

    /// Does what is due now.
    fn expire(&mut self) {
        while let Some(&(deadline, id)) = self.deadlines.first() {
            if deadline > self.now {
                break;
            }
            self.time_out(id);
        }
        if self.accept_again.is_some_and(|again| again <= self.now) {
            self.accept_again = None;
            self.reserve = self.reserve.take().or_else(os::reserve_descriptor);
            if self.poller.add(&self.listener, LISTENER, READ).is_err() {
                self.pause_accepting();
            }
        }
    }

    fn time_out(&mut self, id: Id) {
        let Some(connection) = self.connections.get(id) else { return };
        match connection.phase {
            // Over the soft limit, and nothing was taken for too long.
            Phase::Open { .. } if self.room.is_named(id) => self.give_up(id, Reason::Slow),
            Phase::Open { .. } if connection.waiting == Waiting::Nothing => {
                self.room.refuse(id, TIMED_OUT);
                self.leave(id, Reason::Disconnected);
            }
            // Its NAME came in time, and waits for the budget.
            Phase::Open { .. } => {
                let deadline = Some(self.now + self.options.name_timeout);
                self.set_phase(id, Phase::Open { deadline });
            }
            Phase::Closing { .. } | Phase::Finished { .. } | Phase::Gone => self.free(id),
        }
    }

    // Signals

    fn obey(&mut self) {
        while let Some(signal) = os::next_signal(&mut self.signals) {
            match signal {
                Signal::Stop => self.is_asked_to_stop = self.stop_by.is_none(),
                Signal::Status => self.show_status(),
            }
        }
    }

    fn show_status(&mut self) {
        let open = self.connections.iter().filter(|(_, it)| it.is_open()).count();
        let closing = self.connections.count - open;
        let (named, over) = (self.room.count(), self.flow.over_soft_limit.len());
        let (waiting, dropped) =
            (self.flow.queue.waiting.len(), self.console.pending().all_dropped);
        let since = utc(self.console.started);
        self.console.log(format_args!(
            "status: {open} open, {named} named, {closing} closing, {over} over the soft limit, \
             {waiting} waiting, {dropped} lines dropped, since {since}"
        ));
    }

    /// Takes leave of everybody; the loop goes on until all have been delivered what they are owed
    /// and have ended their side, or `STOP_TIMEOUT` is over.
    fn stop(&mut self) {
        self.console.log(format_args!("stopping"));
        self.stop_by = Some(self.now + STOP_TIMEOUT);
        self.accept_again = None;
        let _ = self.poller.delete(&self.listener, LISTENER);
        for id in 0..self.connections.places.len() {
            match self.connections.get(id).map(|connection| connection.phase) {
                Some(Phase::Open { .. }) => {
                    self.room.delivery.reply(id, &["BYE the server is stopping"]);
                    self.drain(id);
                }
                Some(Phase::Gone) => self.free(id),
                _ => {}
            }
        }
        self.flush();
    }

    fn has_stopped(&self) -> bool {
        let is_over = |by| by <= self.now || self.connections.count == 0;
        self.stop_by.is_some_and(is_over)
    }
}

// ---------------------------------------------------------------------------------------------
// 7. The console: what the person running the server sees
// ---------------------------------------------------------------------------------------------

/// What the chat has to show and another thread prints: a console that is paused (on Windows, in
/// which something is selected) keeps whoever writes to it waiting, and that must not be the chat.
/// What nobody reads is dropped and counted. Names and texts come here only after `parse`, so they
/// cannot forge a line.
#[derive(Clone)]
struct Console {
    pending: Arc<(Mutex<Pending>, Condvar)>,
    started: SystemTime,
}

#[derive(Default)]
struct Pending {
    /// What is not printed yet.
    text: String,
    /// Lines dropped since the last one that was not, and in all.
    dropped: u64,
    all_dropped: u64,
}

impl Console {
    /// Bytes kept while nobody reads.
    const MAX_PENDING: usize = 1024 * 1024;

    fn new() -> Self {
        Console { pending: Arc::default(), started: SystemTime::now() }
    }

    fn pending(&self) -> MutexGuard<'_, Pending> {
        self.pending.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One line, with the time in front.
    fn log(&mut self, what: fmt::Arguments) {
        let time = utc(SystemTime::now());
        let mut pending = self.pending();
        if pending.text.len() >= Self::MAX_PENDING {
            pending.dropped += 1;
            pending.all_dropped += 1;
            return;
        }
        if pending.dropped > 0 {
            let dropped = mem::take(&mut pending.dropped);
            let _ = writeln!(pending.text, "{time} {dropped} lines dropped: nobody read them");
        }
        let _ = writeln!(pending.text, "{time} {what}");
        self.pending.1.notify_one();
    }

    /// Prints all that is shown, for ever.
    fn print(&self, mut out: impl Write) -> ! {
        loop {
            let is_idle = |pending: &mut Pending| pending.text.is_empty();
            let pending = self.pending.1.wait_while(self.pending(), is_idle);
            let text = pending.unwrap_or_else(PoisonError::into_inner).text.clone();
            // Closed, or the disk is full: there is nobody to tell.
            let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
            self.pending().text.drain(..text.len());
            self.pending.1.notify_one();
        }
    }

    /// Waits until everything is printed, but no longer than this.
    fn finish(&self, patience: Duration) {
        let is_printing = |pending: &mut Pending| !pending.text.is_empty();
        let _ = self.pending.1.wait_timeout_while(self.pending(), patience, is_printing);
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
// 8. The command line
// ---------------------------------------------------------------------------------------------

const USAGE: &str = "Usage: linechat-server [OPTIONS] [ADDR]

One chat room for everybody who can send a line of text: telnet, nc, or linechat-client.
ADDR is HOST:PORT; by default port 9999 on every address. Port 0 picks a free one.

Options:
  --max-clients N      connections at the same time (default, and at most: what the limit on
                       open files allows)
  --max-per-ip N       connections at the same time from one address, an IPv6 /64 being one;
                       0 for no limit (default: 200, and no limit for this machine's own)
  --name-timeout SECS  how long a connection may go without a name (default: 60)
  --verbose            show public messages too; private ones are never shown
  --help               show this
  --version            show the version

SIGINT and SIGTERM stop the server; SIGUSR1 shows a line about how things are.
";

#[derive(Debug, PartialEq, Eq)]
struct Options {
    address: Option<String>,
    max_clients: usize,
    /// Nothing: `MAX_PER_IP`, without this machine's own addresses. 0: no limit.
    max_per_ip: Option<u32>,
    name_timeout: Duration,
    verbose: bool,
}

#[derive(Debug, PartialEq, Eq)]
enum Command {
    Run(Options),
    Show(String),
}

/// Reads the command line; an error is one sentence for standard error.
fn parse_arguments(mut arguments: impl Iterator<Item = String>) -> Result<Command, String> {
    let mut options = Options {
        address: None,
        max_clients: usize::MAX,
        max_per_ip: None,
        name_timeout: NAME_TIMEOUT,
        verbose: false,
    };
    while let Some(argument) = arguments.next() {
        let (name, value) = match argument.split_once('=') {
            Some((name, value)) if name.starts_with("--") => (name, Some(value.to_owned())),
            _ => (&*argument, None),
        };
        let has_value = value.is_some();
        let mut number =
            |least| parse_number(name, value.clone().or_else(|| arguments.next()), least);
        match name {
            "--max-clients" => options.max_clients = number(1)? as usize,
            "--max-per-ip" => options.max_per_ip = Some(number(0)?),
            "--name-timeout" => options.name_timeout = Duration::from_secs(number(1)?.into()),
            _ if has_value => return Err(format!("there is no option {argument}")),
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
            _ if name.rsplit_once(':').is_none_or(|(_, port)| port.parse::<u16>().is_err()) => {
                return Err(format!("'{name}' is not HOST:PORT, as in 127.0.0.1:9999"))
            }
            _ => options.address = Some(name.to_owned()),
        }
    }
    Ok(Command::Run(options))
}

fn parse_number(name: &str, value: Option<String>, least: u32) -> Result<u32, String> {
    let value = value.ok_or(format!("{name} needs a number after it"))?;
    let number = value.parse().ok().filter(|&number| number >= least);
    let most = u32::MAX;
    number.ok_or(format!("{name} takes a whole number from {least} to {most}, not '{value}'"))
}

/// Where the server listens if no address is given. That of IPv6 is tried only where it serves IPv4
/// too; `bindv6only` is Linux' setting of that name (ip-sysctl).
fn default_addresses(bindv6only: Option<&str>) -> Vec<SocketAddr> {
    let serves_both = match bindv6only {
        Some(setting) => setting != "1\n",
        None => cfg!(any(target_os = "linux", target_os = "macos")),
    };
    let ipv6 = serves_both.then_some((Ipv6Addr::UNSPECIFIED, 9999).into());
    ipv6.into_iter().chain([(Ipv4Addr::UNSPECIFIED, 9999).into()]).collect()
}

/// Why the server cannot listen, and what to do.
fn explain(address: &str, error: io::Error) -> String {
    let advice = match error.kind() {
        ErrorKind::AddrInUse => "; is another server running? Give another port",
        ErrorKind::PermissionDenied => "; ports below 1024 need special rights",
        _ => "",
    };
    format!("cannot listen on {address}: {error}{advice}")
}

// Everything from here to `main` needs the real operating system, which unit tests do without.

#[cfg(not(test))]
fn bind(address: Option<&str>) -> Result<system::Listener, String> {
    if let Some(address) = address {
        return system::Listener::bind(address).map_err(|error| explain(address, error));
    }
    let bindv6only = std::fs::read_to_string("/proc/sys/net/ipv6/bindv6only").ok();
    let addresses = default_addresses(bindv6only.as_deref());
    system::Listener::bind(&*addresses).map_err(|error| explain("port 9999", error))
}

#[cfg(not(test))]
fn run(mut options: Options) -> Result<(), String> {
    /// Descriptors that are not for clients: the standard three, the poller, the listener, the
    /// signals' two, the reserve, and some that are being closed.
    const RESERVED: usize = 16;
    let limit = system::raise_descriptor_limit();
    options.max_clients = options.max_clients.min(limit.saturating_sub(RESERVED));
    if options.max_clients == 0 {
        return Err(format!(
            "with {limit} open files nobody can be served; raise the limit above {RESERVED} (ulimit -n)"
        ));
    }
    let listener = bind(options.address.as_deref())?;
    let serve = || -> io::Result<()> {
        listener.set_nonblocking(true)?;
        system::set_accept_queue(&listener);
        let address = listener.local_addr()?;
        let mut console = Console::new();
        let printer = console.clone();
        thread::Builder::new()
            .name("console".to_owned())
            .spawn(move || printer.print(io::stdout()))?;
        let signals = system::catch_signals()?;
        let mut server = Server::new(options, listener, signals, console.clone())?;
        console.log(format_args!("listening on {address}"));
        while !server.has_stopped() {
            server.turn()?;
        }
        console.finish(STOP_TIMEOUT);
        Ok(())
    };
    serve().map_err(|error| format!("the operating system refused what the server needs: {error}"))
}

#[cfg(not(test))]
fn main() -> ExitCode {
    let complain = |text: &str| drop(writeln!(io::stderr(), "linechat-server: {text}"));
    let arguments = std::env::args_os().skip(1).map(|word| word.to_string_lossy().into_owned());
    match parse_arguments(arguments) {
        Ok(Command::Show(text)) => match io::stdout().write_all(text.as_bytes()) {
            Ok(()) => ExitCode::SUCCESS,
            Err(_) => ExitCode::FAILURE,
        },
        Ok(Command::Run(options)) => match run(options) {
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
// 9. The operating system: the few calls that std lacks, and the only `unsafe`
// ---------------------------------------------------------------------------------------------

/// Every constant and structure is from the header or the manual page named beside it.
#[allow(unsafe_code)]
#[cfg_attr(test, allow(dead_code, unused_imports))]
mod system {
    use super::{Interest, Readiness, Signal};
    use std::ffi::c_int;
    use std::fs::File;
    use std::io;
    use std::time::{Duration, Instant};

    pub use readiness::Poller;
    pub use signals::{catch_signals, next_signal, Signals};
    pub use std::net::{TcpListener as Listener, TcpStream as Socket};
    /// The spare descriptor.
    pub type Reserve = File;

    pub fn now() -> Instant {
        Instant::now()
    }

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

    type Done = io::Result<()>;

    /// The result of a call, or the error that it left behind.
    fn check(result: c_int) -> io::Result<c_int> {
        match result {
            -1 => Err(io::Error::last_os_error()),
            result => Ok(result),
        }
    }

    /// How many are ready: none if a signal came first.
    pub fn unless_interrupted(waited: io::Result<c_int>) -> io::Result<usize> {
        match waited {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(0),
            waited => Ok(waited? as usize),
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
        use super::{check, milliseconds, number_of, unless_interrupted};
        use super::{Done, Interest, Pollable, Readiness};
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
        /// for one socket, from `add` to `delete`.
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

            pub fn add(&mut self, it: &impl Pollable, token: usize, interest: Interest) -> Done {
                self.control(EPOLL_CTL_ADD, it, token, interest)
            }

            pub fn modify(&mut self, it: &impl Pollable, token: usize, interest: Interest) -> Done {
                self.control(EPOLL_CTL_MOD, it, token, interest)
            }

            pub fn delete(&mut self, it: &impl Pollable, token: usize) -> Done {
                let interest = Interest { read: false, write: false };
                self.control(EPOLL_CTL_DEL, it, token, interest)
            }

            /// Waits until something is ready or the time is over, and fills `ready`.
            pub fn wait(&mut self, ready: &mut Vec<Readiness>, timeout: Option<Duration>) -> Done {
                ready.clear();
                let timeout = milliseconds(timeout);
                let room = self.events.len() as c_int;
                // SAFETY: `events` is writable for `room` entries, and outlives the call.
                let waited = check(unsafe {
                    epoll_wait(self.epoll.as_raw_fd(), self.events.as_mut_ptr(), room, timeout)
                });
                let count = unless_interrupted(waited)?;
                ready.extend(self.events.iter().take(count).map(|event| {
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
                it: &impl Pollable,
                token: usize,
                interest: Interest,
            ) -> Done {
                let read = if interest.read { EPOLLIN } else { 0 };
                let write = if interest.write { EPOLLOUT } else { 0 };
                let mut event = EpollEvent { events: read | write, token: token as u64 };
                // SAFETY: `event` outlives the call; the kernel keeps a copy.
                check(unsafe {
                    epoll_ctl(self.epoll.as_raw_fd(), operation, number_of(it), &mut event)
                })?;
                Ok(())
            }
        }
    }

    /// Readiness everywhere else: poll(2), which Windows calls WSAPoll. It is told of every socket
    /// at every turn, so a large room costs more than with epoll.
    #[cfg(not(all(target_os = "linux", not(linechat_poll))))]
    mod readiness {
        use super::{check, milliseconds, number_of, unless_interrupted};
        use super::{Done, Interest, Number, Pollable, Readiness};
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

        /// A hang-up is none: on some systems it means that the peer has ended only its own
        /// direction, and may still be owed something.
        const FAILURE: i16 = system::ERROR | system::INVALID;

        /// A hang-up cannot be asked not to be reported. Where nobody can make use of it yet, the
        /// socket is left out for so long, which is better than to spin.
        const REST: Duration = Duration::from_millis(50);

        /// Tells which sockets are ready, for as long as they are (level-triggered). A token stands
        /// for one socket, from `add` to `delete`.
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

            pub fn add(&mut self, it: &impl Pollable, token: usize, interest: Interest) -> Done {
                self.watched.insert(token, (number_of(it), interest));
                Ok(())
            }

            pub fn modify(&mut self, it: &impl Pollable, token: usize, interest: Interest) -> Done {
                self.resting.remove(&token);
                self.add(it, token, interest)
            }

            pub fn delete(&mut self, _: &impl Pollable, token: usize) -> Done {
                self.resting.remove(&token);
                self.watched.remove(&token);
                Ok(())
            }

            /// Waits until something is ready or the time is over, and fills `ready`.
            pub fn wait(&mut self, ready: &mut Vec<Readiness>, timeout: Option<Duration>) -> Done {
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
                if unless_interrupted(waited)? == 0 {
                    return Ok(());
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
        &[(4, 30), (5, 10), (6, 3), (18, 60_000), (25, 128 * 1024)]
    } else if cfg!(target_os = "macos") {
        // TCP_KEEPALIVE, TCP_KEEPINTVL, TCP_KEEPCNT, TCP_RXT_CONNDROPTIME (s), TCP_NOTSENT_LOWAT
        &[(0x10, 30), (0x101, 10), (0x102, 3), (0x80, 60), (0x201, 128 * 1024)]
    } else if cfg!(windows) {
        // TCP_KEEPIDLE, TCP_KEEPINTVL, TCP_KEEPCNT, TCP_MAXRT (s)
        &[(3, 30), (17, 10), (16, 3), (5, 60)]
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
    pub fn prepare(socket: &Socket) {
        let set = |level: c_int, name: c_int, value: c_int| {
            let size = size_of::<c_int>() as c_int;
            // SAFETY: `value` outlives the call, and its size is the one given.
            unsafe { setsockopt(number_of(socket), level, name, &value, size) };
        };
        set(SOL_SOCKET, SO_KEEPALIVE, 1);
        set(SOL_SOCKET, SO_OOBINLINE, 1);
        TCP_OPTIONS.iter().for_each(|&(name, value)| set(IPPROTO_TCP, name, value));
    }

    /// Sets how many connections wait to be accepted; std asks for 128. A turn in a large room takes a
    /// while, and whoever then finds no place tries again only after a second (tcp(7),
    /// tcp_syn_retries). The kernel lowers it to its own limit (listen(2)). Windows cannot be asked a
    /// second time.
    pub fn set_accept_queue(listener: &Listener) {
        #[cfg(unix)]
        // SAFETY: takes no pointer; a socket that listens already may be told again.
        unsafe {
            listen(number_of(listener), 4096);
        }
        #[cfg(windows)]
        let _ = listener;
    }

    // Descriptors: getrlimit(2), accept(2)

    #[cfg(unix)]
    extern "C" {
        fn getrlimit(resource: c_int, limit: *mut ResourceLimit) -> c_int;
        fn setrlimit(resource: c_int, limit: *const ResourceLimit) -> c_int;
    }

    /// `struct rlimit` (<sys/resource.h>), where `rlim_t` is 64 bits wide everywhere but in glibc
    /// on 32-bit machines, where it is as wide as `unsigned long`, x32 excepted.
    #[cfg(unix)]
    #[repr(C)]
    struct ResourceLimit {
        soft: RlimT,
        hard: RlimT,
    }

    #[cfg(all(
        unix,
        not(all(target_env = "gnu", target_pointer_width = "32", not(target_arch = "x86_64")))
    ))]
    type RlimT = u64;
    #[cfg(all(unix, target_env = "gnu", target_pointer_width = "32", not(target_arch = "x86_64")))]
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
            // If nothing can be learnt, this is what every system has.
            let mut limit = ResourceLimit { soft: 256, hard: 256 };
            // SAFETY: `limit` outlives the call, which writes it as the structure it is.
            unsafe { getrlimit(RLIMIT_NOFILE, &mut limit) };
            let raise = |to: RlimT| {
                let raised = ResourceLimit { soft: to.max(limit.soft), hard: limit.hard };
                // SAFETY: `raised` outlives the call, which reads it as the structure it is.
                (unsafe { setrlimit(RLIMIT_NOFILE, &raised) } == 0).then_some(raised.soft)
            };
            let raised = raise(limit.hard).or_else(|| raise(limit.hard.min(OPEN_MAX)));
            usize::try_from(raised.unwrap_or(limit.soft)).unwrap_or(usize::MAX)
        }
    }

    /// A descriptor held only to be given up when there is no other.
    pub fn reserve_descriptor() -> Option<Reserve> {
        File::open(if cfg!(windows) { "NUL" } else { "/dev/null" }).ok()
    }

    pub fn is_out_of_descriptors(error: &io::Error) -> bool {
        // ENFILE and EMFILE (<errno.h>), the same on every Unix; WSAEMFILE (<winerror.h>).
        let codes: &[i32] = if cfg!(windows) { &[10024] } else { &[23, 24] };
        error.raw_os_error().is_some_and(|code| codes.contains(&code))
    }

    /// What asks the server to stop on Unix, or for its status: signal(7).
    #[cfg(unix)]
    mod signals {
        use super::{Signal, IS_LINUX};
        use std::ffi::c_int;
        use std::io::{self, Read};
        use std::os::fd::AsRawFd;
        use std::os::unix::net::UnixStream;
        use std::sync::atomic::{AtomicBool, Ordering};
        use std::sync::OnceLock;

        extern "C" {
            fn signal(number: c_int, handler: usize) -> usize;
            fn write(fd: c_int, bytes: *const u8, count: usize) -> isize;
            fn _exit(status: c_int) -> !;
        }

        // <signal.h>: the same on every Unix, but for SIGUSR1.
        const SIGHUP: c_int = 1;
        const SIGINT: c_int = 2;
        const SIGTERM: c_int = 15;
        const SIGUSR1: c_int = if IS_LINUX { 10 } else { 30 };
        const SIG_IGN: usize = 1;

        static WRITER: OnceLock<UnixStream> = OnceLock::new();
        static IS_STOPPING: AtomicBool = AtomicBool::new(false);

        /// Becomes readable when SIGINT or SIGTERM asks the server to stop, or SIGUSR1 for its
        /// status. To be asked a second time to stop ends the process at once. A terminal that goes
        /// away (SIGHUP) does not stop it; std has SIGPIPE ignored already.
        pub type Signals = UnixStream;

        pub fn catch_signals() -> io::Result<Signals> {
            let (reader, writer) = UnixStream::pair()?;
            reader.set_nonblocking(true)?;
            writer.set_nonblocking(true)?;
            let _ = WRITER.set(writer);
            // SAFETY: the handler only does what signal-safety(7) allows, and reads atomics.
            unsafe {
                signal(SIGHUP, SIG_IGN);
                for number in [SIGINT, SIGTERM, SIGUSR1] {
                    signal(number, on_signal as *const () as usize);
                }
            }
            Ok(reader)
        }

        /// What the signals have asked for next, if anything.
        pub fn next_signal(signals: &mut Signals) -> Option<Signal> {
            let mut byte = [0];
            match (signals.read(&mut byte), byte) {
                (Ok(1), [b'?']) => Some(Signal::Status),
                (Ok(1), _) => Some(Signal::Stop),
                _ => None,
            }
        }

        extern "C" fn on_signal(number: c_int) {
            let Some(writer) = WRITER.get() else { return };
            let byte = if number == SIGUSR1 { b"?" } else { b"!" };
            // SAFETY: one byte is there to be written.
            unsafe {
                if number != SIGUSR1 && IS_STOPPING.swap(true, Ordering::SeqCst) {
                    _exit(128 + number);
                }
                write(writer.as_raw_fd(), byte.as_ptr(), 1);
            }
        }
    }

    /// What asks the server to stop on Windows: Ctrl-C, Ctrl-Break, and closing the window
    /// (SetConsoleCtrlHandler, <consoleapi.h>).
    #[cfg(windows)]
    mod signals {
        use super::Signal;
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

        static WRITER: OnceLock<UdpSocket> = OnceLock::new();
        static IS_STOPPING: AtomicBool = AtomicBool::new(false);

        /// Becomes readable when the server is to stop; to be asked a second time ends the process
        /// at once. What wakes it is a packet that the socket sends to itself.
        pub type Signals = UdpSocket;

        pub fn catch_signals() -> io::Result<Signals> {
            let socket = UdpSocket::bind("127.0.0.1:0")?;
            socket.connect(socket.local_addr()?)?;
            socket.set_nonblocking(true)?;
            let _ = WRITER.set(socket.try_clone()?);
            // SAFETY: the handler is there as long as the process.
            match unsafe { SetConsoleCtrlHandler(on_event, 1) } {
                0 => Err(io::Error::last_os_error()),
                _ => Ok(socket),
            }
        }

        /// What the signals have asked for next, if anything.
        pub fn next_signal(signals: &mut Signals) -> Option<Signal> {
            signals.recv(&mut [0]).ok().map(|_| Signal::Stop)
        }

        /// Windows calls this in a thread of its own. Returning 0 ends the process.
        extern "system" fn on_event(event: u32) -> i32 {
            if IS_STOPPING.swap(true, Ordering::SeqCst) {
                return 0;
            }
            if let Some(socket) = WRITER.get() {
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

#[cfg(test)]
#[path = "conformance/linechat/simulation_tests.rs"]
mod simulation_tests;
