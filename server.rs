//! linechat-server: one chat room that any line client can join.
//!
//! Try it:
//!
//!     cargo run --release --bin linechat-server     (or: make run-server)
//!     telnet localhost 9999                         (in two more windows)
//!     NAME ana                                      (NAME bob in the other)
//!     MSG hello, everyone
//!
//! PROTOCOL.md specifies what goes over the wire; `--help` lists the options. One thread runs the
//! chat in an event loop; a second thread only prints the console's lines. The parts:
//!
//! 1. the wire: bytes into lines, lines into requests, replies into lines;
//! 2. output: the log, which holds the lines for everybody, and each client's outbox;
//! 3. the room: clients, members, and the effect of each request;
//! 4. flow control: the fair queue, and the budget that applies while output piles up;
//! 5. the event loop: wait, accept, read, write, close, time-outs;
//! 6. the console, and 7. the command line;
//! 8. the operating system: the few calls that std lacks, and the only `unsafe`.
//!
//! One turn of the event loop (`Server::turn`):
//!
//!     Poller::wait
//!     handle_readiness ───── queues clients whose sockets are readable or writable
//!     carry_out_waiting ──── requests that have waited for the budget, up to half a turn
//!     serve_queued ───────── clients with input, in the order of the fair queue, until the turn is full:
//!       serve                  leftover input or one read of 16 KiB; if others wait, a quantum
//!         process_input          Decoder::next, line by line
//!           handle_line            refuses another protocol; while the budget applies, queues what costs
//!             carry_out              parse, Room::carry_out: fills the log and the outboxes
//!     write_all ──────────── normally one write to each client; pending limits; trims the log
//!     update_budget ──────── does the budget apply now?
//!     accept ─────────────── add_client: limits, HELLO; or turn_away: ERR full
//!     expire ─────────────── time-outs; then stop, if a signal came, and Console::flush
//!
//! There are no passwords, no encryption, one room, and no history.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::fmt::{self, Write as _};
use std::io::{self, ErrorKind, Read, Write};
use std::mem;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr};
use std::rc::Rc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
#[cfg(not(test))]
use std::{process::ExitCode, thread};

#[cfg(not(test))]
use system as os;
#[cfg(test)]
#[path = "conformance/linechat/simulation.rs"]
mod os;

// ---------------------------------------------------------------------------------------------
// The limits (PROTOCOL.md, "Limits" and "Annex B: many people and slow readers")
// ---------------------------------------------------------------------------------------------

/// Bytes of a request without its line ending, telnet commands and erased characters.
const MAX_REQUEST: usize = 4000;
/// Bytes of a line from the server, with CR LF.
const MAX_LINE: usize = 4096;
/// Bytes of a name.
const MAX_NAME: usize = 50;
/// Rosters are pushed while the room has at most this many members.
const MAX_PUSHED_ROSTER: usize = 100;
/// A client's requests wait while its pending replies, and the private messages before the last of
/// them, have more bytes than this (back-pressure).
const REPLY_LIMIT: usize = 64 * 1024;
/// Pending bytes of one client. While one client has more, the budget applies to all clients.
const SOFT_LIMIT: usize = 256 * 1024;
/// Pending bytes of the own lines of all clients together. While there are more, the budget applies
/// too.
const OWN_BYTES_LIMIT: usize = 64 * 1024 * 1024;
/// Bytes a second that requests may cost while the budget applies, and the size of its bucket.
const BUDGET: usize = 64 * 1024;
/// A client with more pending bytes is disconnected (a slow consumer). The soft limit plus one
/// minute of the budget.
const HARD_LIMIT: usize = SOFT_LIMIT + 60 * BUDGET;
/// While the budget applies, a member that takes none of its pending output for this long is
/// disconnected. There is no idle time-out for members.
const STALL_TIMEOUT: Duration = Duration::from_secs(60);
/// How long a connection may go without a name (`--name-timeout`).
const NAME_TIMEOUT: Duration = Duration::from_secs(60);
/// How long a closing connection may take until its output has drained and the client has closed.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(60);
/// How long a server that stops waits for clients to close, and then for the console to print.
const STOP_TIMEOUT: Duration = Duration::from_secs(1);
/// Connections from one address or IPv6 /64 (not this machine's own), unless `--max-per-ip` says
/// otherwise.
const MAX_PER_IP: usize = 200;

// ---------------------------------------------------------------------------------------------
// 1. The wire: bytes into lines, lines into requests, replies into lines
// ---------------------------------------------------------------------------------------------

const BACKSPACE: u8 = 0x08;
const DELETE: u8 = 0x7f;

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

/// Where a connection's bytes stand in the telnet protocol (PROTOCOL.md, "Annex A: telnet").
#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Telnet {
    #[default]
    Text,
    Command,
    /// The next byte names an option. `Some`: the command that refuses it; `None`: no answer.
    Option(Option<u8>),
    Subnegotiation,
    SubnegotiationCommand,
}

/// Splits one connection's bytes into lines, however the network cuts them into pieces
/// (PROTOCOL.md, "Framing" and "Annex A: telnet").
#[derive(Default)]
struct Decoder {
    /// The current line so far, without telnet commands and erased characters. While the line is
    /// skipped, only its last byte counts.
    line: Vec<u8>,
    telnet: Telnet,
    /// The current line is too long, and the rest of it is discarded.
    is_skipping: bool,
}

/// What `Decoder::next` returns.
#[derive(Debug, PartialEq, Eq)]
enum Decoded {
    /// A whole line without its ending; never an empty one.
    Line(Vec<u8>),
    /// A line has just passed `MAX_REQUEST`.
    TooLong,
    /// The answer to a telnet command.
    TelnetAnswer(Vec<u8>),
}

impl Decoder {
    /// Takes bytes from the front of `input` until something is found; `None`: all bytes are taken.
    fn next(&mut self, input: &mut &[u8]) -> Option<Decoded> {
        loop {
            self.take_run(input);
            let (&byte, rest) = input.split_first()?;
            *input = rest;
            let found = match self.ends_line(byte) {
                true => self.end_line(),
                false => self.take(byte),
            };
            if found.is_some() {
                return found;
            }
        }
    }

    /// Takes a run of printable ASCII in one step, because most input is that.
    fn take_run(&mut self, input: &mut &[u8]) {
        if self.telnet == Telnet::Text && !self.is_skipping {
            let space = MAX_REQUEST.saturating_sub(self.line.len()).min(input.len());
            let is_special = |byte: &u8| !matches!(byte, b' '..=b'~');
            let run = input[..space].iter().position(is_special);
            let (text, rest) = input.split_at(run.unwrap_or(space));
            self.line.extend(text);
            *input = rest;
        }
    }

    /// LF ends a line, and so does CR NUL, which telnet sends for Enter in character mode (RFC
    /// 854).
    fn ends_line(&self, byte: u8) -> bool {
        let after_cr = self.line.last() == Some(&b'\r');
        self.telnet == Telnet::Text && (byte == b'\n' || byte == 0 && after_cr)
    }

    /// Ends the current line and returns it, unless it is empty or was skipped.
    fn end_line(&mut self) -> Option<Decoded> {
        let mut line = mem::take(&mut self.line);
        if line.last() == Some(&b'\r') {
            line.pop();
        }
        let is_found = !mem::take(&mut self.is_skipping) && !line.is_empty();
        is_found.then_some(Decoded::Line(line))
    }

    /// Takes a byte that does not end the line.
    fn take(&mut self, byte: u8) -> Option<Decoded> {
        self.telnet = match (self.telnet, byte) {
            (Telnet::Text, telnet::COMMAND) => Telnet::Command,
            (Telnet::Text, BACKSPACE | DELETE) => {
                self.erase();
                Telnet::Text
            }
            (Telnet::Text, _) | (Telnet::Command, telnet::COMMAND) => {
                self.telnet = Telnet::Text;
                return self.push(byte);
            }
            (Telnet::Command, telnet::WILL) => Telnet::Option(Some(telnet::DONT)),
            (Telnet::Command, telnet::DO) => Telnet::Option(Some(telnet::WONT)),
            (Telnet::Command, telnet::WONT | telnet::DONT) => Telnet::Option(None),
            (Telnet::Command, telnet::SUBNEGOTIATION) => Telnet::Subnegotiation,
            (Telnet::Command, _) => Telnet::Text,
            (Telnet::Option(answer), option) => {
                self.telnet = Telnet::Text;
                let answer = answer.map(|answer| vec![telnet::COMMAND, answer, option]);
                return answer.map(Decoded::TelnetAnswer);
            }
            (Telnet::Subnegotiation, telnet::COMMAND) => Telnet::SubnegotiationCommand,
            (Telnet::SubnegotiationCommand, telnet::SUBNEGOTIATION_END) => Telnet::Text,
            (Telnet::Subnegotiation | Telnet::SubnegotiationCommand, _) => Telnet::Subnegotiation,
        };
        None
    }

    /// Appends a byte to the line. A CR may begin the line's ending, so it does not count yet.
    fn push(&mut self, byte: u8) -> Option<Decoded> {
        if self.is_skipping {
            self.line.clear();
        }
        self.line.push(byte);
        let length = self.line.strip_suffix(b"\r").unwrap_or(&self.line).len();
        if self.is_skipping || length <= MAX_REQUEST {
            return None;
        }
        self.is_skipping = true;
        Some(Decoded::TooLong)
    }

    /// Removes the last character: its continuation bytes, then its lead byte. The skipped rest of
    /// a line stays as it is.
    fn erase(&mut self) {
        let is_continuation = |byte| byte & 0b1100_0000 == 0b1000_0000;
        while !self.is_skipping && self.line.pop().is_some_and(is_continuation) {}
    }
}

/// Why a request is refused: a code for programs and a text for people (PROTOCOL.md, "Errors").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Refusal(&'static str, &'static str);

const BAD_NAME: Refusal = Refusal(
    "bad-name",
    "a name has 1 to 50 bytes: letters, digits, _ - . and visible characters beyond ASCII; it cannot start with _ - .",
);
const BAD_TEXT: Refusal = Refusal(
    "bad-text",
    "lines are UTF-8 without control characters (TAB is fine), line separators or bidirectional controls",
);
const UNKNOWN_COMMAND: Refusal = Refusal("unknown-command", "no such command; HELP lists them");
const NOT_NAMED: Refusal = Refusal("not-named", "choose a name first: NAME <name>");
const ALREADY_NAMED: Refusal =
    Refusal("already-named", "you have a name, and it cannot be changed");
const NAME_TAKEN: Refusal = Refusal("name-taken", "somebody here has that name; choose another");
const NO_SUCH_USER: Refusal =
    Refusal("no-such-user", "nobody here has that name; LIST shows who is here");
const LINE_TOO_LONG: Refusal = Refusal("line-too-long", "a line has at most 4000 bytes");
const OTHER_PROTOCOL: Refusal =
    Refusal("usage", "this is linechat: no HTTP, no TLS, and at most 4000 bytes in a line");
const FULL: Refusal = Refusal("full", "no more connections can be taken now; try again later");
const FULL_FOR_ADDRESS: Refusal = Refusal("full", "too many connections from your address");
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

/// Each verb, and its line in the reply to HELP, which is also the text of `ERR usage`.
const VERBS: [(&str, &str); 7] = [
    ("NAME", "NAME <name> takes a name and enters the room"),
    ("MSG", "MSG <text> says something to everybody else"),
    ("PRIV", "PRIV @<name> <text> says something to one person alone"),
    ("LIST", "LIST tells who is here"),
    ("PING", "PING [token] is answered with PONG and the same token"),
    ("HELP", "HELP shows these lines"),
    ("QUIT", "QUIT leaves"),
];

/// Parses a line. `Server::handle_line` has checked the line's length and the connection's first
/// line before; `Room::carry_out` checks names afterwards (PROTOCOL.md, "Requests").
fn parse(line: &[u8], is_named: bool) -> Result<Request<'_>, Refusal> {
    let line = std::str::from_utf8(line).map_err(|_| BAD_TEXT)?;
    let is_plain = line.bytes().all(|byte| matches!(byte, b' '..=b'~'));
    if !is_plain && line.chars().any(is_forbidden_in_text) {
        return Err(BAD_TEXT);
    }
    let (word, argument) = line.split_once(' ').unwrap_or((line, ""));
    let is_verb = |(verb, _): &&(&str, _)| verb.eq_ignore_ascii_case(word);
    let &(verb, usage) = VERBS.iter().find(is_verb).ok_or(UNKNOWN_COMMAND)?;
    let required = |text| Some(text).filter(|text: &&str| !text.is_empty());
    let no_argument = |request| argument.bytes().all(|byte| byte == b' ').then_some(request);
    let request = match (verb, is_named) {
        ("NAME", true) => return Err(ALREADY_NAMED),
        ("MSG" | "PRIV" | "LIST", false) => return Err(NOT_NAMED),
        ("NAME", _) => required(argument).map(Request::Name),
        ("MSG", _) => required(argument).map(Request::Msg),
        ("PRIV", _) => {
            argument.strip_prefix('@').and_then(|argument| argument.split_once(' ')).and_then(
                |(to, text)| Some(Request::Priv { to: required(to)?, text: required(text)? }),
            )
        }
        ("PING", _) => Some(Request::Ping(argument)),
        ("LIST", _) => no_argument(Request::List),
        ("HELP", _) => no_argument(Request::Help),
        _ => no_argument(Request::Quit),
    };
    request.ok_or(Refusal("usage", usage))
}

/// Returns true if a connection's first line is HTTP or TLS. A web page can make a browser send
/// either to any port, with lines of the page's choice inside. A TLS ClientHello starts with byte
/// 22 (RFC 8446, section 5.1).
fn is_other_protocol(line: &[u8]) -> bool {
    line.first() == Some(&22) || line.windows(6).any(|bytes| bytes == b" HTTP/")
}

/// Returns true for characters that could move a terminal's cursor, forge a line or reorder what is
/// shown (PROTOCOL.md, "Text").
fn is_forbidden_in_text(character: char) -> bool {
    match character {
        '\t' => false,
        '\u{2028}' | '\u{2029}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => true,
        _ => character.is_control(),
    }
}

/// Returns true if `name` can be a name (PROTOCOL.md, "Names").
fn is_good_name(name: &str) -> bool {
    let is_first = |c: char| c.is_ascii_alphanumeric() || !c.is_ascii();
    let is_further = |c: char| is_first(c) || matches!(c, '_' | '-' | '.');
    name.len() <= MAX_NAME
        && name.starts_with(is_first)
        && name.chars().all(|c| is_further(c) && !is_forbidden_in_names(c))
}

/// Returns true for the characters beyond ASCII that a name must not contain: white space,
/// controls, invisible, private-use and bidirectional characters, and noncharacters.
fn is_forbidden_in_names(character: char) -> bool {
    let is_last_of_plane = u32::from(character) & 0xfffe == 0xfffe;
    is_last_of_plane
        || matches!(character,
            '\u{80}'..='\u{a0}' | '\u{ad}' | '\u{34f}' | '\u{61c}' | '\u{115f}' | '\u{1160}'
            | '\u{1680}' | '\u{17b4}' | '\u{17b5}' | '\u{180b}'..='\u{180f}'
            | '\u{2000}'..='\u{200f}' | '\u{2028}'..='\u{202f}' | '\u{205f}'..='\u{206f}'
            | '\u{2800}' | '\u{3000}' | '\u{3164}' | '\u{e000}'..='\u{f8ff}'
            | '\u{fdd0}'..='\u{fdef}' | '\u{fe00}'..='\u{fe0f}' | '\u{feff}' | '\u{ffa0}'
            | '\u{fff0}'..='\u{fffb}' | '\u{13430}'..='\u{1343f}' | '\u{1bca0}'..='\u{1bca3}'
            | '\u{1d159}' | '\u{1d173}'..='\u{1d17a}' | '\u{e0000}'..='\u{10ffff}')
}

/// The form in which names are compared, so that they are case-insensitive (PROTOCOL.md, "Names").
fn name_key(name: &str) -> String {
    name.to_lowercase()
}

/// Appends one line to `out`: the words, separated by spaces, and CR LF.
fn put_line(out: &mut Vec<u8>, words: &[&str]) {
    out.reserve(words.iter().map(|word| word.len() + 1).sum::<usize>() + 1);
    for (position, word) in words.iter().enumerate() {
        if position > 0 {
            out.push(b' ');
        }
        out.extend(word.as_bytes());
    }
    out.extend(b"\r\n");
}

fn line(words: &[&str]) -> Vec<u8> {
    let mut line = Vec::new();
    put_line(&mut line, words);
    line
}

/// Appends a roster to `out`, on as many USERS lines as it takes (PROTOCOL.md, "Joining, leaving,
/// roster").
fn put_roster<'a>(out: &mut Vec<u8>, count: usize, names: impl Iterator<Item = &'a str>) {
    let head = format!("USERS {count}");
    let mut start = out.len();
    out.extend(head.as_bytes());
    for name in names {
        if out.len() - start + 1 + name.len() + 2 > MAX_LINE {
            out.extend(b"\r\n");
            start = out.len();
            out.extend(head.as_bytes());
        }
        out.push(b' ');
        out.extend(name.as_bytes());
    }
    out.extend(b"\r\n");
}

// ---------------------------------------------------------------------------------------------
// 2. Output: the log, and each client's outbox
// ---------------------------------------------------------------------------------------------

/// The lines for everybody, each stored once, whatever the size of the room.
///
/// A position is the number of bytes logged before it, so trimming does not change it. Each
/// client's outbox has a cursor into the log. Bytes that every cursor has passed are trimmed.
#[derive(Default)]
struct Log {
    bytes: Vec<u8>,
    /// The position of the first byte in `bytes`.
    start: u64,
}

impl Log {
    /// Bytes of memory that an empty log keeps: enough for one turn.
    const KEPT_CAPACITY: usize = 128 * 1024;

    fn end(&self) -> u64 {
        self.start + self.bytes.len() as u64
    }

    /// The bytes between two positions. `from` may lie before `start` only if `to <= from`; the
    /// slice is then empty.
    fn slice(&self, from: u64, to: u64) -> &[u8] {
        match from < to {
            true => &self.bytes[(from - self.start) as usize..(to - self.start) as usize],
            false => &[],
        }
    }

    /// Drops the bytes before `position` once they are more than half of the log, so that on
    /// average a byte is moved less than once.
    fn trim(&mut self, position: u64) {
        let dead = (position - self.start) as usize;
        if dead > self.bytes.len() / 2 {
            self.bytes.drain(..dead);
            self.bytes.shrink_to(Self::KEPT_CAPACITY);
            self.start = position;
        }
    }
}

/// The output of one client that its socket has not taken: a part of the log, and the client's own
/// lines, which are replies to its requests and private messages, inserted into that part.
///
///     log:       … MSG ana hi │ MSG bob hello │ MSG eve hey │
///                  ^ next     ^ an insert: own line PONG 1, then skip what bob sent itself
///     bob gets:  MSG ana hi, PONG 1, MSG eve hey
#[derive(Default)]
struct Outbox {
    /// Position in the log of the next byte to send.
    next: u64,
    /// Where the log ends for this client: `IN_ROOM` for a member; 0 before it joins or once it has
    /// failed; after it has left, where the log ended then.
    end: u64,
    /// Sorted by position; every position is between `next` and the end.
    inserts: VecDeque<Insert>,
    /// Bytes of own lines in all inserts.
    own_bytes: usize,
    /// Bytes of own lines up to the end of the last reply.
    until_reply: usize,
}

/// A place in the log at which a client receives own lines, and then skips bytes of the log.
struct Insert {
    position: u64,
    own: VecDeque<u8>,
    skip: u64,
}

impl Outbox {
    const IN_ROOM: u64 = u64::MAX;
    /// Bytes of a chunk that mixes own lines and lines of the log.
    const CHUNK: usize = 64 * 1024;

    /// Pending bytes, to which the soft and hard limits apply. Lines to be skipped are counted,
    /// because they too keep the log from being trimmed.
    fn pending(&self, log: &Log) -> usize {
        self.own_bytes + (self.end.min(log.end()) - self.next) as usize
    }

    /// The client receives the log from here on, after the own lines that are pending.
    fn start_at_end(&mut self, log: &Log) {
        (self.next, self.end) = (log.end(), Self::IN_ROOM);
        self.inserts.iter_mut().for_each(|insert| insert.position = log.end());
    }

    /// The client receives nothing that is logged from now on.
    fn stop_at_end(&mut self, log: &Log) {
        self.end = self.end.min(log.end());
    }

    /// Appends own lines after everything that is pending.
    fn push(&mut self, lines: Vec<u8>, log: &Log, is_reply: bool) {
        let position = self.end.min(log.end());
        self.own_bytes += lines.len();
        match self.inserts.back_mut() {
            Some(last) if last.position == position => last.own.extend(lines),
            _ => self.inserts.push_back(Insert { position, own: lines.into(), skip: 0 }),
        }
        if is_reply {
            self.until_reply = self.own_bytes;
        }
    }

    /// A member does not receive the last `length` bytes of the log: its own MSG or JOINED.
    fn skip(&mut self, length: usize, log: &Log) {
        if self.end != Self::IN_ROOM {
            return;
        }
        let skip = length as u64;
        let position = log.end() - skip;
        match self.inserts.back_mut() {
            // Nothing else of the log is pending.
            _ if self.next == position => self.start_at_end(log),
            Some(last) if last.position + last.skip == position => last.skip += skip,
            _ => self.inserts.push_back(Insert { position, own: VecDeque::new(), skip }),
        }
    }

    /// Returns what to write next: own lines alone, or all of the log that is pending, or a chunk
    /// of both that is put together in `scratch`. Empty only if nothing is pending.
    fn next_chunk<'a>(&'a self, log: &'a Log, scratch: &'a mut Vec<u8>) -> &'a [u8] {
        let end = self.end.min(log.end());
        match self.inserts.front() {
            None => return log.slice(self.next, end),
            Some(first) if self.next == end => return first.own.as_slices().0,
            Some(_) => scratch.clear(),
        }
        let put = |scratch: &mut Vec<u8>, bytes: &[u8]| {
            scratch.extend(&bytes[..bytes.len().min(Self::CHUNK - scratch.len())]);
        };
        let mut position = self.next;
        for insert in &self.inserts {
            put(scratch, log.slice(position, insert.position));
            put(scratch, insert.own.as_slices().0);
            put(scratch, insert.own.as_slices().1);
            if scratch.len() == Self::CHUNK {
                break;
            }
            position = insert.position + insert.skip;
        }
        put(scratch, log.slice(position, end));
        scratch
    }

    /// The socket has taken this many bytes of the chunk. Returns how many of them were own lines.
    fn consume(&mut self, mut taken: usize) -> usize {
        let own_before = self.own_bytes;
        while let Some(insert) = self.inserts.front_mut() {
            let logged = taken.min((insert.position - self.next) as usize);
            taken -= logged;
            self.next += logged as u64;
            if self.next < insert.position {
                break;
            }
            insert.position += mem::take(&mut insert.skip);
            self.next = insert.position;
            let own = taken.min(insert.own.len());
            insert.own.drain(..own);
            taken -= own;
            self.own_bytes -= own;
            if !insert.own.is_empty() {
                break;
            }
            self.inserts.pop_front();
        }
        self.next += taken as u64;
        if self.inserts.is_empty() {
            self.inserts = VecDeque::new();
        }
        let own_taken = own_before - self.own_bytes;
        self.until_reply = self.until_reply.saturating_sub(own_taken);
        own_taken
    }

    /// The first position of the log that this client still needs; `None` if it needs nothing.
    fn cursor(&self, log: &Log) -> Option<u64> {
        (self.next < self.end.min(log.end())).then_some(self.next)
    }
}

// ---------------------------------------------------------------------------------------------
// 3. The room: clients, members, and the effect of each request
// ---------------------------------------------------------------------------------------------

/// A connection's slot in the table of clients, and its token with the poller. A slot is used again
/// after its client is removed.
type Id = usize;

/// A connection, and what the server knows of its client.
struct Client {
    socket: os::Socket,
    address: SocketAddr,
    state: State,
    /// `None` until NAME is accepted, and again after the client has left the room.
    name: Option<Rc<str>>,
    decoder: Decoder,
    /// The client has sent a line that is not empty.
    has_spoken: bool,
    /// Input that has been read and not processed yet: the turn was full, the quantum was used up,
    /// or the client must wait.
    unprocessed: Box<[u8]>,
    /// A request that waits for the budget. If `Some`, the client stands in `Budget::queue`.
    waiting_request: Option<Box<[u8]>>,
    outbox: Outbox,
    /// The client stands in `Room::writes`.
    is_write_queued: bool,
    /// The socket takes nothing now. The poller reports when it is writable again.
    is_blocked: bool,
    /// The readiness that the poller has been asked for.
    interest: Interest,
    /// - Open or failed, without a name: the name time-out.
    /// - Open, with a name: the earliest time at which the client is stalled; `None` while no output is
    ///   pending.
    /// - Closing or lingering: when the connection is dropped.
    deadline: Option<Instant>,
}

/// The states of a connection (PROTOCOL.md, "Closing and half-closing").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Requests are carried out.
    Open,
    /// The connection has failed, usually because of a reset. Requests that arrived before are
    /// still read and carried out. The poller would report the failure for ever, so it no longer
    /// watches the socket.
    Failed,
    /// Pending output drains. Input is discarded, until the client ends its side of the stream.
    Closing { input_ended: bool },
    /// Everything is sent and the server has ended its side of the stream. Closing the socket now
    /// would reset the connection if the client still sends something (RFC 1122, section 4.2.2.13),
    /// which could destroy the last lines. So the server lingers until the client closes.
    Lingering,
}

/// Which readiness the poller is asked to report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Interest {
    read: bool,
    write: bool,
}

const READ: Interest = Interest { read: true, write: false };

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Watch {
    Begin(Interest),
    Change(Interest),
    End,
}

impl Client {
    fn new(socket: os::Socket, address: SocketAddr) -> Self {
        Client {
            socket,
            address,
            state: State::Open,
            name: None,
            decoder: Decoder::default(),
            has_spoken: false,
            unprocessed: Box::default(),
            waiting_request: None,
            outbox: Outbox::default(),
            is_write_queued: false,
            is_blocked: false,
            interest: READ,
            deadline: None,
        }
    }

    fn is_closing(&self) -> bool {
        matches!(self.state, State::Closing { .. } | State::Lingering)
    }

    /// Returns true if the next request of a client that is not closing can be carried out: no
    /// other request waits, and at most `REPLY_LIMIT` bytes are pending up to its last reply. If
    /// not, the server stops reading (back-pressure).
    fn takes_requests(&self) -> bool {
        self.waiting_request.is_none() && self.outbox.until_reply <= REPLY_LIMIT
    }

    /// Returns true if the server should read from this client: to carry out requests, or to
    /// discard input.
    fn takes_input(&self) -> bool {
        match self.state {
            State::Open | State::Failed => self.takes_requests(),
            State::Closing { input_ended } => !input_ended,
            State::Lingering => true,
        }
    }

    /// Reads once. `Some(0)`: the end of the stream; `None`: no input now. In `State::Failed` no
    /// input now is an error, because no more will come.
    fn read(&mut self, into: &mut [u8]) -> io::Result<Option<usize>> {
        match self.socket.read(into) {
            Err(error) if is_not_ready(&error) && self.state != State::Failed => Ok(None),
            result => result.map(Some),
        }
    }

    /// Writes pending output once, unless the socket is blocked. Returns how many bytes it took,
    /// and how many of them were own lines.
    fn write(&mut self, log: &Log, scratch: &mut Vec<u8>) -> io::Result<(usize, usize)> {
        if self.is_blocked {
            return Ok((0, 0));
        }
        let chunk = self.outbox.next_chunk(log, scratch);
        if chunk.is_empty() {
            return Ok((0, 0));
        }
        let taken = match self.socket.write(chunk) {
            Err(error) if is_not_ready(&error) => 0,
            result => result?,
        };
        self.is_blocked = taken < chunk.len();
        Ok((taken, self.outbox.consume(taken)))
    }
}

/// Returns true if a call on a socket must be repeated when the socket is ready.
fn is_not_ready(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
}

#[derive(Default)]
struct Clients {
    slots: Vec<Option<Client>>,
    free: Vec<Id>,
}

impl Clients {
    /// The slot that the next client gets.
    fn next_id(&self) -> Id {
        self.free.last().copied().unwrap_or(self.slots.len())
    }

    fn insert(&mut self, client: Client) {
        match self.free.pop() {
            Some(id) => self.slots[id] = Some(client),
            None => self.slots.push(Some(client)),
        }
    }

    fn remove(&mut self, id: Id) -> Option<Client> {
        let client = self.slots.get_mut(id)?.take()?;
        self.free.push(id);
        Some(client)
    }

    fn get(&self, id: Id) -> Option<&Client> {
        self.slots.get(id)?.as_ref()
    }

    fn get_mut(&mut self, id: Id) -> Option<&mut Client> {
        self.slots.get_mut(id)?.as_mut()
    }

    fn count(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    fn iter(&self) -> impl Iterator<Item = (Id, &Client)> {
        self.slots.iter().enumerate().filter_map(|(id, slot)| Some((id, slot.as_ref()?)))
    }
}

/// All clients, the members among them, and what they are owed.
#[derive(Default)]
struct Room {
    clients: Clients,
    /// The clients with a name, in the order of joining.
    members: Vec<Id>,
    /// Members by name; see `name_key`.
    by_name: HashMap<Rc<str>, Id>,
    log: Log,
    /// Pending own lines of all clients, in bytes.
    own_bytes: usize,
    /// The log has grown or a cursor has moved, so it is worth looking for the slowest cursor.
    may_trim: bool,
    /// Clients to write to at the end of the turn, in the order of queueing: clients with new own
    /// lines or output left over, newly writable and closing ones.
    writes: Vec<Id>,
    /// The work of this turn, in the units of `BYTE_FOR_ALL` and `LINE_FOR_ALL`.
    work: u64,
    budget: Budget,
    /// The room has changed while the budget applied, so a roster may be due when that ceases.
    owes_roster: bool,
}

impl Room {
    /// The work of a byte that is read or broadcast. A byte for a single client is 1: if it were
    /// more, one LIST in a flood would delay its sender's next request by seconds.
    const BYTE_FOR_ALL: u64 = 64;
    /// A line for everybody is as much work as if it were this many bytes longer.
    const LINE_FOR_ALL: usize = 64;
    /// A turn is full after this much work. In a room of a thousand that is tens of milliseconds,
    /// in which the system copies up to 128 KiB to each member.
    const FULL_TURN: u64 = 128 * 1024 * Self::BYTE_FOR_ALL;

    fn name(&self, id: Id) -> Option<Rc<str>> {
        self.clients.get(id)?.name.clone()
    }

    /// Finds a member by name. The length is checked first, because lower case can be shorter: 20
    /// KELVIN SIGNs (60 bytes) are no name, but 20 letters k are.
    fn find(&self, name: &str) -> Option<Id> {
        let is_possible = name.len() <= MAX_NAME;
        is_possible.then(|| self.by_name.get(&*name_key(name)).copied())?
    }

    fn names(&self) -> impl Iterator<Item = &str> {
        self.members.iter().filter_map(|&id| self.clients.get(id)?.name.as_deref())
    }

    fn queue_write(&mut self, id: Id) {
        if let Some(client) = self.clients.get_mut(id) {
            if !mem::replace(&mut client.is_write_queued, true) {
                self.writes.push(id);
            }
        }
    }

    /// Appends own lines to a client's outbox. `is_reply` is false for a private message.
    fn push_own(&mut self, id: Id, lines: Vec<u8>, is_reply: bool) {
        let Some(client) = self.clients.get_mut(id) else { return };
        if client.state != State::Failed {
            self.own_bytes += lines.len();
            self.work += lines.len() as u64;
            client.outbox.push(lines, &self.log, is_reply);
            self.queue_write(id);
        }
    }

    fn reply(&mut self, id: Id, words: &[&str]) {
        self.push_own(id, line(words), true);
    }

    fn refuse(&mut self, id: Id, Refusal(code, text): Refusal) {
        self.reply(id, &["ERR", code, text]);
    }

    /// Logs lines for every member except `except`, which need not be a member.
    fn broadcast(&mut self, except: Id, put: impl FnOnce(&mut Vec<u8>)) {
        let before = self.log.bytes.len();
        put(&mut self.log.bytes);
        let length = self.log.bytes.len() - before;
        self.work += (length + Self::LINE_FOR_ALL) as u64 * Self::BYTE_FOR_ALL;
        if let Some(client) = self.clients.get_mut(except) {
            client.outbox.skip(length, &self.log);
        }
    }

    /// The cost of a request: what it takes from the budget, in bytes (PROTOCOL.md, "Annex B: many
    /// people and slow readers").
    fn cost(&self, id: Id, request: Request) -> usize {
        let name_length = self.name(id).map_or(0, |name| name.len());
        match request {
            // JOINED now and LEFT later: 43 bytes without the names, with counts of six digits.
            Request::Name(name) if self.check_name(name).is_ok() => 2 * name.len() + 43,
            Request::Msg(text) => "MSG  \r\n".len() + name_length + text.len(),
            Request::Priv { to, text } if self.find(to).is_some_and(|to| to != id) => {
                "PRIV  \r\n".len() + name_length + text.len()
            }
            _ => 0,
        }
    }

    /// Carries out a request. After QUIT, the caller closes the connection.
    fn carry_out(&mut self, id: Id, request: Request) -> Result<(), Refusal> {
        match request {
            Request::Name(name) => {
                self.check_name(name)?;
                self.join(id, name);
            }
            Request::Msg(text) => {
                let from = self.name(id).ok_or(NOT_NAMED)?;
                self.broadcast(id, |log| put_line(log, &["MSG", &from, text]));
            }
            Request::Priv { to, text } => self.send_private(id, to, text)?,
            Request::List => {
                let mut lines = Vec::new();
                put_roster(&mut lines, self.members.len(), self.names());
                self.push_own(id, lines, true);
            }
            Request::Ping("") => self.reply(id, &["PONG"]),
            Request::Ping(token) => self.reply(id, &["PONG", token]),
            Request::Help => VERBS.iter().for_each(|(_, usage)| self.reply(id, &["HELP", usage])),
            Request::Quit => self.reply(id, &["BYE see you"]),
        }
        Ok(())
    }

    fn check_name(&self, name: &str) -> Result<(), Refusal> {
        match is_good_name(name) {
            false => Err(BAD_NAME),
            true if self.find(name).is_some() => Err(NAME_TAKEN),
            true => Ok(()),
        }
    }

    fn join(&mut self, id: Id, name: &str) {
        let Some(client) = self.clients.get_mut(id) else { return };
        let (own_name, key): (Rc<str>, _) = (name.into(), name_key(name));
        // A name that is its own key is stored once.
        self.by_name.insert(if key == name { own_name.clone() } else { key.into() }, id);
        client.name = Some(own_name);
        if client.state != State::Failed {
            client.outbox.start_at_end(&self.log);
        }
        self.members.push(id);
        let count = self.members.len().to_string();
        self.reply(id, &["WELCOME", name, &count]);
        self.broadcast(id, |log| put_line(log, &["JOINED", name, &count]));
        self.push_roster();
    }

    fn send_private(&mut self, id: Id, to: &str, text: &str) -> Result<(), Refusal> {
        let to = self.find(to).ok_or(NO_SUCH_USER)?;
        let (from, to_name) = (self.name(id).ok_or(NOT_NAMED)?, self.name(to).ok_or(NO_SUCH_USER)?);
        self.push_own(to, line(&["PRIV", &from, text]), false);
        self.reply(id, &["SENT", &to_name, text]);
        Ok(())
    }

    /// Removes a member from the room; its pending output stays. Returns its name; `None` if it was
    /// not a member.
    fn remove_member(&mut self, id: Id) -> Option<Rc<str>> {
        let client = self.clients.get_mut(id)?;
        let name = client.name.take()?;
        client.outbox.stop_at_end(&self.log);
        self.by_name.remove(&*name_key(&name));
        let place = self.members.iter().position(|&member| member == id)?;
        self.members.remove(place);
        Some(name)
    }

    /// Removes a member and tells the others why (PROTOCOL.md, "Joining, leaving, roster").
    fn leave(&mut self, id: Id, reason: &str) -> Option<Rc<str>> {
        let name = self.remove_member(id)?;
        let count = self.members.len().to_string();
        self.broadcast(id, |log| put_line(log, &["LEFT", &name, &count, reason]));
        self.push_roster();
        Some(name)
    }

    /// Pushes the roster after a join or a leave, if the room is small enough. Rosters are the
    /// largest output that one client can cause for all, so they are withheld while the budget
    /// applies.
    fn push_roster(&mut self) {
        self.owes_roster = self.budget.applies();
        let count = self.members.len();
        if !self.owes_roster && (1..=MAX_PUSHED_ROSTER).contains(&count) {
            let mut lines = Vec::new();
            put_roster(&mut lines, count, self.names());
            self.work += lines.len() as u64 * Self::BYTE_FOR_ALL;
            self.log.bytes.extend(lines);
        }
    }

    fn trim_log(&mut self) {
        if !mem::take(&mut self.may_trim) {
            return;
        }
        let cursors = self.clients.iter().filter_map(|(_, client)| client.outbox.cursor(&self.log));
        let slowest = cursors.min().unwrap_or(self.log.end());
        self.log.trim(slowest);
    }
}

// ---------------------------------------------------------------------------------------------
// 4. Flow control: the fair queue, and the budget that applies while output piles up
// ---------------------------------------------------------------------------------------------

/// Fair queueing (Demers, Keshav and Shenker, 1989): the waiting client with the smallest virtual
/// finish time is served next.
///
/// A request's finish is its cost added to the client's last finish or the virtual time, whichever
/// is later. Virtual time advances by the cost that is served, divided by the number of waiting
/// clients. So clients that send little are served before clients that send much, a new client
/// starts at the present virtual time, and no client starves.
#[derive(Default)]
struct FairQueue {
    /// The expected cost of each waiting client, by `SCALE` times its expected finish.
    waiting: BTreeMap<(u128, Id), u64>,
    /// The latest finish of each client; cleared when no client waits.
    finishes: BTreeMap<Id, u128>,
    virtual_time: u128,
}

impl FairQueue {
    const SCALE: u128 = 1 << 16;

    /// Adds a client unless it is in the queue already.
    fn push(&mut self, id: Id, expected_cost: u64) {
        let last = self.finishes.get(&id).copied().unwrap_or(0);
        if !self.waiting.contains_key(&(last, id)) {
            let finish = last.max(self.virtual_time) + u128::from(expected_cost) * Self::SCALE;
            self.waiting.insert((finish, id), expected_cost);
            self.finishes.insert(id, finish);
        }
    }

    fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// The next client and its expected cost.
    fn first(&self) -> Option<(Id, u64)> {
        self.waiting.first_key_value().map(|(&(_, id), &cost)| (id, cost))
    }

    /// Removes the next client from the queue. The caller then reports the cost to `charge`.
    fn pop(&mut self) -> Option<Id> {
        let ((finish, id), expected_cost) = self.waiting.pop_first()?;
        self.finishes.insert(id, finish - u128::from(expected_cost) * Self::SCALE);
        Some(id)
    }

    /// A client has been served at this cost.
    fn charge(&mut self, id: Id, cost: u64) {
        let cost = u128::from(cost) * Self::SCALE;
        self.virtual_time += cost / (self.waiting.len() as u128 + 1);
        if let Some(finish) = self.finishes.get_mut(&id) {
            *finish += cost;
        }
        self.reset_if_empty();
    }

    /// Removes a client, whether it waits or not.
    fn remove(&mut self, id: Id) {
        if let Some(finish) = self.finishes.remove(&id) {
            self.waiting.remove(&(finish, id));
        }
        self.reset_if_empty();
    }

    fn reset_if_empty(&mut self) {
        if self.waiting.is_empty() {
            self.finishes.clear();
            self.virtual_time = 0;
        }
    }
}

/// The budget for the requests of all clients together, and the clients whose request waits for it
/// (PROTOCOL.md, "Annex B: many people and slow readers").
///
/// It is a token bucket (a rate limit), stored as the time `paid_until`: each cost moves that
/// forward, but not further than now and the time in which a bucket fills.
#[derive(Default)]
struct Budget {
    /// When it began to apply; `None` while it does not.
    applies_since: Option<Instant>,
    /// Clients above the soft limit.
    over_soft_limit: BTreeSet<Id>,
    /// The time up to which the budget is spent; `None` until a request has been paid for.
    paid_until: Option<Instant>,
    queue: FairQueue,
    /// The queue is not tried before this time, because the bucket held too little for the next
    /// request.
    next_batch: Option<Instant>,
}

impl Budget {
    /// Requests go on in batches this far apart, because each batch costs a write to everybody.
    const BATCH_INTERVAL: Duration = Duration::from_millis(20);

    fn applies(&self) -> bool {
        self.applies_since.is_some()
    }

    /// Decides from the clients' pending output whether the budget applies from now on.
    fn update(&mut self, own_bytes: usize, now: Instant) {
        let applies = !self.over_soft_limit.is_empty() || own_bytes > OWN_BYTES_LIMIT;
        self.applies_since = applies.then_some(self.applies_since.unwrap_or(now));
    }

    /// Takes the next client from the queue if the budget allows its request now, and takes the
    /// cost from the bucket. While the budget does not apply, every request may go on.
    fn next(&mut self, now: Instant) -> Option<Id> {
        let (id, cost) = self.queue.first()?;
        if self.applies() {
            if Some(now) < self.next_batch {
                return None;
            }
            let paid_until = self.paid_until.map_or(now, |until| until.max(now)) + time_for(cost);
            if paid_until > now + time_for(BUDGET as u64) {
                self.next_batch = Some(now + Self::BATCH_INTERVAL);
                return None;
            }
            self.paid_until = Some(paid_until);
        }
        self.queue.pop();
        self.queue.charge(id, cost);
        Some(id)
    }

    /// When to call `next` again; `None` if no request waits.
    fn next_time(&self, now: Instant) -> Option<Instant> {
        let batch = self.next_batch.filter(|_| self.applies());
        (!self.queue.is_empty()).then_some(batch.unwrap_or(now))
    }
}

/// The time in which the budget grows by `bytes`.
fn time_for(bytes: u64) -> Duration {
    Duration::from_nanos(bytes * 1_000_000_000 / BUDGET as u64)
}

// ---------------------------------------------------------------------------------------------
// 5. The event loop
// ---------------------------------------------------------------------------------------------

/// Poller tokens that are not slots.
const LISTENER: usize = usize::MAX;
const SIGNALS: usize = usize::MAX - 1;

/// The readiness of one socket. A failure counts as readable and writable, so that the next read or
/// write finds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Readiness {
    token: usize,
    readable: bool,
    writable: bool,
    failed: bool,
}

struct Server {
    options: Options,
    poller: os::Poller,
    listener: os::Listener,
    signals: os::Signals,
    room: Room,
    /// Clients with input. The cost of each is the `Room::work` that it causes.
    to_serve: FairQueue,
    /// The number of connections from each IPv4 address or IPv6 /64.
    ip_groups: HashMap<IpAddr, usize>,
    /// The end of the log when it was last written to all clients.
    written: u64,
    /// No client's deadline is earlier than this.
    next_deadline: Option<Instant>,
    /// The listener is paused until this time.
    accept_paused_until: Option<Instant>,
    /// When the console was last told that the budget applies.
    budget_notice: Option<Instant>,
    /// `Some` while the server is stopping: when it ends even if clients have not closed.
    stop_deadline: Option<Instant>,
    /// When this turn's wait began.
    wait_began: Instant,
    /// When it ended.
    now: Instant,
    console: Console,
    /// Buffers for what is read from, and written to, one client.
    input: Vec<u8>,
    output: Vec<u8>,
}

impl Server {
    /// Bytes read from one connection at once.
    const READ_SIZE: usize = 16 * 1024;
    /// Connections accepted in one turn.
    const ACCEPTS: usize = 512;
    /// How long the listener is paused after accept has failed for a reason that may last.
    const ACCEPT_PAUSE: Duration = Duration::from_millis(250);
    /// How often the console is told that the budget applies.
    const BUDGET_NOTICE_INTERVAL: Duration = Duration::from_secs(10);
    /// The quantum: after this much work of its requests, a client gives way to others that have
    /// input. The longest MSG is about that much.
    const QUANTUM: u64 = MAX_LINE as u64 * Room::BYTE_FOR_ALL;

    fn new(
        options: Options,
        listener: os::Listener,
        signals: os::Signals,
        console: Console,
    ) -> io::Result<Self> {
        let mut poller = os::Poller::new()?;
        poller.watch(&listener, LISTENER, Watch::Begin(READ))?;
        poller.watch(&signals, SIGNALS, Watch::Begin(READ))?;
        let now = os::now();
        Ok(Server {
            options,
            poller,
            listener,
            signals,
            room: Room::default(),
            to_serve: FairQueue::default(),
            ip_groups: HashMap::new(),
            written: 0,
            next_deadline: None,
            accept_paused_until: None,
            budget_notice: None,
            stop_deadline: None,
            wait_began: now,
            now,
            console,
            input: vec![0; Self::READ_SIZE],
            output: Vec::new(),
        })
    }

    /// One turn of the event loop. An error means that the poller has failed.
    fn turn(&mut self) -> io::Result<()> {
        self.wait_began = os::now();
        let ready = self.poller.wait(self.time_until_next_deadline())?;
        self.now = os::now();
        let (mut listener_ready, mut stops) = (false, false);
        for readiness in ready {
            match readiness.token {
                LISTENER => listener_ready = true,
                SIGNALS => stops |= os::was_signalled(&self.signals),
                _ => self.handle_readiness(readiness),
            }
        }
        self.carry_out_waiting();
        self.serve_queued();
        self.write_all();
        self.update_budget();
        // Accept late, so that slots that were released in this turn can be used again.
        if listener_ready {
            self.accept();
        }
        self.expire();
        if stops && self.stop_deadline.is_none() {
            self.stop();
        }
        self.console.flush();
        Ok(())
    }

    fn handle_readiness(&mut self, readiness: Readiness) {
        let id = readiness.token;
        let Some(client) = self.room.clients.get_mut(id) else { return };
        let wants_read = client.interest.read;
        if readiness.writable && mem::take(&mut client.is_blocked) {
            self.room.queue_write(id);
        }
        if readiness.readable && wants_read {
            self.to_serve.push(id, Self::QUANTUM);
        } else if readiness.failed {
            self.abandon_output(id);
        }
    }

    // Accepting

    fn accept(&mut self) {
        for _ in 0..Self::ACCEPTS {
            match self.listener.accept() {
                // If setting up a new socket fails, its peer has usually gone already.
                Ok((socket, address)) => drop(self.add_client(socket, address)),
                Err(error) => match error.kind() {
                    ErrorKind::WouldBlock => return,
                    ErrorKind::ConnectionAborted
                    | ErrorKind::ConnectionReset
                    | ErrorKind::Interrupted => {}
                    _ => return self.pause_accepting(),
                },
            }
        }
    }

    fn add_client(&mut self, socket: os::Socket, address: SocketAddr) -> io::Result<()> {
        let address = SocketAddr::new(address.ip().to_canonical(), address.port());
        let group = ip_group(address);
        let is_local = || {
            address.ip().is_loopback()
                || socket.local_addr().is_ok_and(|own| own.ip().to_canonical() == address.ip())
        };
        let max_per_ip = match self.options.max_per_ip {
            Some(0) => usize::MAX,
            Some(max) => max as usize,
            None if is_local() => usize::MAX,
            None => MAX_PER_IP,
        };
        if self.ip_groups.get(&group).is_some_and(|&count| count >= max_per_ip) {
            self.turn_away(socket, address, FULL_FOR_ADDRESS);
        } else if self.room.clients.count() >= self.options.max_clients {
            self.turn_away(socket, address, FULL);
        } else {
            socket.set_nonblocking(true)?;
            // A turn's lines go out in one write, so Nagle's algorithm would only delay them.
            socket.set_nodelay(true)?;
            os::set_socket_options(&socket);
            let id = self.room.clients.next_id();
            self.poller.watch(&socket, id, Watch::Begin(READ))?;
            self.room.clients.insert(Client::new(socket, address));
            *self.ip_groups.entry(group).or_default() += 1;
            self.set_deadline(id, Some(self.now + self.options.name_timeout));
            self.room.reply(
                id,
                &["HELLO linechat/1 choose a name with NAME <name>; HELP shows the rest"],
            );
            self.console.log(format_args!("{address} connected"));
        }
        Ok(())
    }

    /// Refuses a connection and closes it. Input that has arrived is read first, or the close would
    /// reset the connection (see `State::Lingering`). The server does not linger
    /// here, because that would use up descriptors.
    fn turn_away(&mut self, mut socket: os::Socket, address: SocketAddr, refusal: Refusal) {
        let Refusal(code, text) = refusal;
        if socket.set_nonblocking(true).is_ok() && socket.write(&line(&["ERR", code, text])).is_ok()
        {
            let _ = socket.shutdown(Shutdown::Write);
            let _ = socket.read(&mut self.input);
        }
        self.console.log(format_args!("{address} refused: \"{text}\""));
    }

    /// Pauses the listener, so that a lasting failure, such as EMFILE (too many open files), does
    /// not make the loop spin.
    fn pause_accepting(&mut self) {
        self.accept_paused_until = Some(self.now + Self::ACCEPT_PAUSE);
        let _ = self.poller.watch(&self.listener, LISTENER, Watch::End);
    }

    fn resume_accepting(&mut self) {
        self.accept_paused_until = None;
        if self.poller.watch(&self.listener, LISTENER, Watch::Begin(READ)).is_err() {
            self.pause_accepting();
        }
    }

    // Reading

    /// Carries out the requests that the budget allows now. Half a turn is left for other clients.
    fn carry_out_waiting(&mut self) {
        while self.room.work < Room::FULL_TURN / 2 {
            let Some(id) = self.room.budget.next(self.now) else { return };
            let Some(client) = self.room.clients.get_mut(id) else { continue };
            if let Some(line) = client.waiting_request.take() {
                self.carry_out(id, &line);
                self.requeue(id);
            }
        }
    }

    /// Serves one client after the other until the turn is full.
    fn serve_queued(&mut self) {
        while self.room.work < Room::FULL_TURN {
            let Some(id) = self.to_serve.pop() else { return };
            let before = self.room.work;
            self.serve(id);
            self.to_serve.charge(id, self.room.work - before);
            self.requeue(id);
        }
    }

    /// Processes input that is left from before, or else reads.
    fn serve(&mut self, id: Id) {
        let Some(client) = self.room.clients.get_mut(id) else { return };
        let input = mem::take(&mut client.unprocessed);
        match input.is_empty() {
            true => self.read(id),
            false => self.process_input(id, &input),
        }
    }

    /// Queues a client again if it has more input that can be processed, and updates what the
    /// poller reports. A failed client is read until nothing is left.
    fn requeue(&mut self, id: Id) {
        let Some(client) = self.room.clients.get(id) else { return };
        let has_more = !client.unprocessed.is_empty() || client.state == State::Failed;
        if has_more && client.takes_requests() {
            self.to_serve.push(id, Self::QUANTUM);
        }
        self.update_interest(id);
    }

    /// Reads once, if input is wanted, and processes it.
    fn read(&mut self, id: Id) {
        let Some(client) = self.room.clients.get_mut(id).filter(|it| it.takes_input()) else {
            return;
        };
        let mut input = mem::take(&mut self.input);
        match client.read(&mut input) {
            Ok(None) => {}
            Ok(Some(0)) => self.handle_end_of_stream(id),
            Ok(Some(length)) => {
                self.room.work += length as u64 * Room::BYTE_FOR_ALL;
                self.process_input(id, &input[..length]);
            }
            Err(_) => self.disconnect(id, "disconnected"),
        }
        self.input = input;
    }

    /// Carries out requests line by line, until the turn is full, the quantum is used up while
    /// other clients wait, or this client must wait. The rest of `input` is kept. A closing
    /// client's input is discarded.
    fn process_input(&mut self, id: Id, mut input: &[u8]) {
        let full = match self.to_serve.is_empty() {
            true => Room::FULL_TURN,
            false => Room::FULL_TURN.min(self.room.work + Self::QUANTUM),
        };
        while let Some(client) = self.room.clients.get_mut(id).filter(|it| !it.is_closing()) {
            if self.room.work >= full || !client.takes_requests() {
                client.unprocessed = input.into();
                return;
            }
            match client.decoder.next(&mut input) {
                Some(Decoded::Line(line)) => self.handle_line(id, Some(&line)),
                Some(Decoded::TooLong) => self.handle_line(id, None),
                Some(Decoded::TelnetAnswer(answer)) => self.room.push_own(id, answer, true),
                None => return,
            }
        }
    }

    /// Handles one line (`None`: too long): refuses it, carries it out, or lets it wait for the
    /// budget. A first line that is too long may hide another protocol.
    fn handle_line(&mut self, id: Id, line: Option<&[u8]>) {
        let Some(client) = self.room.clients.get_mut(id) else { return };
        let is_first = !mem::replace(&mut client.has_spoken, true);
        if is_first && line.is_none_or(is_other_protocol) {
            self.room.refuse(id, OTHER_PROTOCOL);
            return self.leave_and_close(id, "other protocol");
        }
        let Some(line) = line else { return self.room.refuse(id, LINE_TOO_LONG) };
        let is_named = client.name.is_some();
        let cost = match self.room.budget.applies() {
            true => parse(line, is_named).map_or(0, |request| self.room.cost(id, request)),
            false => 0,
        };
        if cost == 0 {
            return self.carry_out(id, line);
        }
        if let Some(client) = self.room.clients.get_mut(id) {
            client.waiting_request = Some(line.into());
            self.room.budget.queue.push(id, cost as u64);
        }
    }

    fn carry_out(&mut self, id: Id, line: &[u8]) {
        let Some(client) = self.room.clients.get(id) else { return };
        let address = client.address;
        let result = parse(line, client.name.is_some())
            .and_then(|request| self.room.carry_out(id, request).map(|()| request));
        match result {
            Err(refusal) => self.room.refuse(id, refusal),
            Ok(Request::Name(name)) => {
                self.set_deadline(id, None);
                let count = self.room.members.len();
                self.console.log(format_args!("{address} joined as {name}, {count} online"));
            }
            Ok(Request::Msg(text)) if self.options.verbose => {
                let name = self.room.name(id).unwrap_or_default();
                self.console.log(format_args!("{address} {name}: {text}"));
            }
            Ok(Request::Quit) => self.leave_and_close(id, "quit"),
            Ok(_) => {}
        }
    }

    // Writing

    /// Writes pending output: first to the clients in `Room::writes`, then, if the log has grown,
    /// to all others. A client is written to twice only if a write disconnects another.
    fn write_all(&mut self) {
        let (writes, end) = (mem::take(&mut self.room.writes), self.room.log.end());
        writes.into_iter().for_each(|id| self.write(id));
        // A LEFT that is logged here reaches the clients already written to in the next turn, at
        // once.
        if mem::replace(&mut self.written, end) < end {
            self.room.may_trim = true;
            for id in 0..self.room.clients.slots.len() {
                if self.room.clients.get(id).is_some_and(|client| !client.is_write_queued) {
                    self.write(id);
                }
            }
        }
        self.room.trim_log();
        self.room.work = 0;
    }

    fn write(&mut self, id: Id) {
        let Room { clients, log, own_bytes, may_trim, .. } = &mut self.room;
        let Some(client) = clients.get_mut(id) else { return };
        client.is_write_queued = false;
        let held_log = client.outbox.cursor(log).is_some();
        let Ok((taken, own)) = client.write(log, &mut self.output) else {
            return self.abandon_output(id);
        };
        *own_bytes -= own;
        *may_trim |= held_log && taken > 0;
        self.enforce_pending_limits(id, taken > 0);
    }

    /// Acts on how much output is pending: disconnects above the hard limit, notes the soft limit
    /// for the budget, sets the deadline after which the client is stalled, half-closes a
    /// connection that has drained, and goes on with the client's requests.
    fn enforce_pending_limits(&mut self, id: Id, has_taken: bool) {
        let Some(client) = self.room.clients.get(id) else { return };
        let pending = client.outbox.pending(&self.room.log);
        if pending > HARD_LIMIT {
            return self.disconnect(id, "slow");
        }
        match pending > SOFT_LIMIT {
            true => self.room.budget.over_soft_limit.insert(id),
            false => self.room.budget.over_soft_limit.remove(&id),
        };
        if pending > 0 && !client.is_blocked {
            self.room.queue_write(id);
        }
        let Some(client) = self.room.clients.get(id) else { return };
        match client.state {
            State::Open if client.name.is_some() && pending == 0 => self.set_deadline(id, None),
            State::Open if client.name.is_some() && (has_taken || client.deadline.is_none()) => {
                // Not `self.now`: the write may come long after the turn began.
                self.set_deadline(id, Some(os::now() + STALL_TIMEOUT));
            }
            State::Closing { .. } if pending == 0 => self.linger(id),
            _ => {}
        }
        // Replies may have drained, so that the next request no longer waits.
        self.requeue(id);
    }

    /// Asks the poller for the readiness that the client's state can use, and for no other.
    fn update_interest(&mut self, id: Id) {
        let Some(client) = self.room.clients.get_mut(id) else { return };
        let interest = Interest { read: client.takes_input(), write: client.is_blocked };
        if client.state != State::Failed
            && mem::replace(&mut client.interest, interest) != interest
            && self.poller.watch(&client.socket, id, Watch::Change(interest)).is_err()
        {
            self.abandon_output(id);
        }
    }

    /// Decides whether the budget applies now. If it has ceased, a roster that was withheld is
    /// pushed. While it applies, the console is told from time to time which client has the most
    /// pending output.
    fn update_budget(&mut self) {
        self.room.budget.update(self.room.own_bytes, self.now);
        if self.room.owes_roster && !self.room.budget.applies() {
            self.room.push_roster();
        }
        let next = self.budget_notice.map(|last| last + Self::BUDGET_NOTICE_INTERVAL);
        if !self.room.budget.applies() || Some(self.now) < next {
            return;
        }
        self.budget_notice = Some(self.now);
        let clients = self.room.clients.iter().map(|(_, client)| client);
        let pending = clients.map(|it| (it.outbox.pending(&self.room.log), it.address));
        if let Some((pending, address)) = pending.max() {
            let pending = pending >> 10;
            self.console
                .log(format_args!("the rate limit applies: {pending} KiB pending for {address}"));
        }
    }

    // Leaving and closing:
    //
    //     Open ─┬─ QUIT, half-close, another protocol, no name in time ─ leave_and_close ─ begin_close
    //           ├─ stop ───────────────────────────────────────────────────────────────── begin_close
    //           ├─ write error, or failure while not reading ─ abandon_output: Failed
    //           └─ read error, hard limit, stall ─ disconnect ─ release
    //     begin_close: Closing ─ drained ─ linger: Lingering ─ half-close, time-out, failure ─ release
    //         (no Lingering if the client has half-closed; a time-out or a failure releases at once)
    //     Failed ─ end of input, QUIT, another protocol, no name in time, stop ─ release

    /// The client has ended its side of the stream (EOF, half-close). An unfinished line is
    /// dropped.
    fn handle_end_of_stream(&mut self, id: Id) {
        self.leave_and_close(id, "disconnected");
        let Some(client) = self.room.clients.get_mut(id) else { return };
        match &mut client.state {
            State::Closing { input_ended } => *input_ended = true,
            _ => self.release(id),
        }
    }

    /// Stops writing to a client after a failure such as a reset, and discards its output. What it
    /// sent before the failure is still read. A closing client is released.
    fn abandon_output(&mut self, id: Id) {
        let Some(client) = self.room.clients.get_mut(id) else { return };
        if client.is_closing() {
            return self.release(id);
        }
        client.state = State::Failed;
        if client.name.is_some() {
            client.deadline = None;
        }
        self.detach(id);
        self.to_serve.push(id, Self::QUANTUM);
    }

    /// Discards a client's pending output and stops watching its socket.
    fn detach(&mut self, id: Id) {
        let Some(client) = self.room.clients.get_mut(id) else { return };
        let _ = self.poller.watch(&client.socket, id, Watch::End);
        let outbox = mem::take(&mut client.outbox);
        self.room.own_bytes -= outbox.own_bytes;
        self.room.may_trim = true;
        self.room.budget.over_soft_limit.remove(&id);
    }

    /// Removes a client from the room, tells the others, and closes the connection when its output
    /// has drained.
    fn leave_and_close(&mut self, id: Id, reason: &str) {
        self.leave_room(id, reason);
        self.begin_close(id);
    }

    /// Removes a client from the room and closes the connection at once: input and output are
    /// discarded.
    fn disconnect(&mut self, id: Id, reason: &str) {
        self.leave_room(id, reason);
        self.release(id);
    }

    /// Removes a client from the room, and tells the room and the console why, unless it is
    /// closing. Reasons other than `quit`, `disconnected` and `slow` are for clients without a
    /// name, so LEFT never has them.
    fn leave_room(&mut self, id: Id, reason: &str) {
        let Some(client) = self.room.clients.get(id).filter(|client| !client.is_closing()) else {
            return;
        };
        let address = client.address;
        match self.room.leave(id, reason) {
            Some(name) => {
                let count = self.room.members.len();
                self.console.log(format_args!("{address} {name} left ({reason}), {count} online"));
            }
            None => self.console.log(format_args!("{address} left ({reason})")),
        }
    }

    /// Drains a client's output before the connection is closed. Its input is discarded.
    fn begin_close(&mut self, id: Id) {
        let Some(client) = self.room.clients.get_mut(id) else { return };
        match client.state {
            State::Open => {}
            State::Failed => return self.release(id),
            State::Closing { .. } | State::Lingering => return,
        }
        client.state = State::Closing { input_ended: false };
        client.unprocessed = Box::default();
        client.decoder = Decoder::default();
        client.waiting_request = None;
        self.room.budget.queue.remove(id);
        self.set_deadline(id, Some(self.now + CLOSE_TIMEOUT));
        self.room.queue_write(id);
    }

    /// Half-closes a connection whose output has drained, and lingers until the client closes;
    /// releases it if the client has ended its side.
    fn linger(&mut self, id: Id) {
        let Some(client) = self.room.clients.get_mut(id) else { return };
        let has_ended = client.state == State::Closing { input_ended: true };
        if has_ended || client.socket.shutdown(Shutdown::Write).is_err() {
            return self.release(id);
        }
        client.state = State::Lingering;
    }

    /// Closes the socket and frees the slot. The client must have left the room.
    fn release(&mut self, id: Id) {
        self.detach(id);
        let Some(client) = self.room.clients.remove(id) else { return };
        self.room.budget.queue.remove(id);
        self.to_serve.remove(id);
        let group = ip_group(client.address);
        if let Some(count) = self.ip_groups.get_mut(&group) {
            *count -= 1;
            if *count == 0 {
                self.ip_groups.remove(&group);
            }
        }
    }

    // Time

    fn set_deadline(&mut self, id: Id, deadline: Option<Instant>) {
        if let Some(client) = self.room.clients.get_mut(id) {
            client.deadline = deadline;
            let earliest = self.next_deadline.into_iter().chain(deadline).min();
            self.next_deadline = earliest;
        }
    }

    fn time_until_next_deadline(&self) -> Option<Duration> {
        let has_output = !self.room.writes.is_empty() || self.written < self.room.log.end();
        if has_output || !self.to_serve.is_empty() {
            return Some(Duration::ZERO);
        }
        let budget = self.room.budget.next_time(self.wait_began);
        let next = [self.next_deadline, budget, self.accept_paused_until, self.stop_deadline];
        Some(next.into_iter().flatten().min()?.saturating_duration_since(self.wait_began))
    }

    /// Acts on the clients' deadlines that had passed before the wait began. So if this process was
    /// suspended past a deadline, it first handles the input that has arrived meanwhile. Also ends
    /// the listener's pause.
    fn expire(&mut self) {
        if self.next_deadline.is_some_and(|next| next <= self.wait_began) {
            let is_due =
                |client: &Client| client.deadline.is_some_and(|due| due <= self.wait_began);
            let clients = self.room.clients.iter();
            let due: Vec<Id> = clients.filter(|(_, it)| is_due(it)).map(|(id, _)| id).collect();
            due.into_iter().for_each(|id| self.time_out(id));
            let deadlines = self.room.clients.iter().filter_map(|(_, client)| client.deadline);
            self.next_deadline = deadlines.min();
        }
        if self.accept_paused_until.is_some_and(|until| until <= self.now) {
            self.resume_accepting();
        }
    }

    fn time_out(&mut self, id: Id) {
        // A request that came in time may be unprocessed because the turn was full.
        self.room.work = 0;
        self.serve(id);
        self.requeue(id);
        let Some(client) = self.room.clients.get(id) else { return };
        if client.deadline.is_none_or(|deadline| self.wait_began < deadline) {
            return;
        }
        match client.state {
            State::Open if client.name.is_some() => match self.room.budget.applies_since {
                Some(since) if since + STALL_TIMEOUT <= self.now => self.disconnect(id, "slow"),
                since => {
                    let since = since.unwrap_or(self.now);
                    self.set_deadline(id, Some(since + STALL_TIMEOUT));
                }
            },
            // NAME has come in time, and waits for the budget.
            State::Open | State::Failed if client.waiting_request.is_some() => {
                self.set_deadline(id, Some(self.now + self.options.name_timeout));
            }
            State::Open | State::Failed => {
                self.room.refuse(id, TIMED_OUT);
                self.leave_and_close(id, "timeout");
            }
            State::Closing { .. } | State::Lingering => self.release(id),
        }
    }

    /// Graceful shutdown: sends BYE to every client that is not closing. The loop goes on until all
    /// connections have ended, or `STOP_TIMEOUT` is over.
    fn stop(&mut self) {
        self.console.log(format_args!("stopping"));
        self.stop_deadline = Some(self.now + STOP_TIMEOUT);
        if self.accept_paused_until.take().is_none() {
            let _ = self.poller.watch(&self.listener, LISTENER, Watch::End);
        }
        for id in 0..self.room.clients.slots.len() {
            if self.room.clients.get(id).is_some_and(|client| !client.is_closing()) {
                self.room.reply(id, &["BYE the server is stopping"]);
                self.room.remove_member(id);
                self.begin_close(id);
            }
        }
    }

    fn has_stopped(&self) -> bool {
        let is_over = |deadline| deadline <= self.now || self.room.clients.count() == 0;
        self.stop_deadline.is_some_and(is_over)
    }
}

/// The addresses whose connections `--max-per-ip` counts together: an IPv4 address, or an IPv6 /64,
/// of which one machine can use every address (RFC 7421).
fn ip_group(address: SocketAddr) -> IpAddr {
    match address.ip() {
        IpAddr::V6(ip) => IpAddr::V6(Ipv6Addr::from_bits(ip.to_bits() & (!0 << 64))),
        ip => ip,
    }
}

// ---------------------------------------------------------------------------------------------
// 6. The console: what the operator sees
// ---------------------------------------------------------------------------------------------

/// Sends lines to the thread that prints them, once a turn: a paused console (on Windows, one in
/// which text is selected) blocks its writer, and must not block the chat. While `MAX_PENDING`
/// bytes wait to be printed, lines are dropped and counted. Names and texts come here only after
/// `parse`, so they cannot forge a line.
struct Console {
    text: String,
    texts: Sender<String>,
    /// Bytes of the texts that have been sent and not printed.
    pending: Arc<AtomicUsize>,
    dropped: u64,
}

impl Console {
    const MAX_PENDING: usize = 1024 * 1024;

    fn new() -> (Self, Receiver<String>) {
        let (texts, receiver) = mpsc::channel();
        (Console { text: String::new(), texts, pending: Arc::default(), dropped: 0 }, receiver)
    }

    /// Adds one line, with the time in front.
    fn log(&mut self, what: fmt::Arguments) {
        let time = utc(SystemTime::now());
        if self.pending.load(Ordering::Relaxed) >= Self::MAX_PENDING {
            self.dropped += 1;
            return;
        }
        let dropped = mem::take(&mut self.dropped);
        if dropped > 0 {
            let _ = writeln!(self.text, "{time} {dropped} lines dropped: the console was not read");
        }
        let _ = writeln!(self.text, "{time} {what}");
    }

    /// Hands this turn's lines to the printing thread.
    fn flush(&mut self) {
        if !self.text.is_empty() {
            self.pending.fetch_add(self.text.len(), Ordering::Relaxed);
            let _ = self.texts.send(mem::take(&mut self.text));
        }
    }
}

/// Prints what the console sends, until the console is dropped.
fn print_texts(texts: Receiver<String>, pending: &AtomicUsize, mut out: impl Write) {
    for text in texts {
        // If the console is closed or the disk is full, there is nobody to tell.
        let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
        pending.fetch_sub(text.len(), Ordering::Relaxed);
    }
}

/// A time as RFC 3339 writes it, in UTC, to the second. The date is counted from 1 March of year 0,
/// so that a leap day ends its year ("chrono-Compatible Low-Level Date Algorithms",
/// civil_from_days).
fn utc(time: SystemTime) -> String {
    let seconds = time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let days = seconds / 86_400 + 719_468;
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let year = era * 400 + year + month / 10;
    let month = (month + 2) % 12 + 1;
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

// ---------------------------------------------------------------------------------------------
// 7. The command line
// ---------------------------------------------------------------------------------------------

const HELP_TEXT: &str = "Usage: linechat-server [OPTIONS] [ADDR]

One chat room that any line client can join: telnet, nc, or linechat-client.
ADDR is HOST:PORT, HOST or PORT; by default port 9999 on every address (some systems: IPv4 only).
Port 0 picks a free one.

Options:
  --max-clients N      connections at the same time (default, and at most: what the limit on
                       open files allows)
  --max-per-ip N       connections at the same time from one address (an IPv6 /64 counts
                       as one); 0 for no limit (default: 200; no limit for this machine's own)
  --name-timeout SECS  how long a connection may go without a name (default: 60)
  --verbose            show public messages too; private ones are never shown
  --help               show this
  --version            show the version

SIGINT and SIGTERM stop the server, SIGHUP does not: the server outlives its terminal.
";

/// Where to listen. Without a host: see `any_addresses`.
#[derive(Debug, PartialEq, Eq)]
struct Address {
    host: Option<String>,
    port: u16,
}

#[derive(Debug, PartialEq, Eq)]
struct Options {
    address: Address,
    max_clients: usize,
    /// `None`: `MAX_PER_IP`, and no limit for this machine's own addresses. 0: no limit.
    max_per_ip: Option<u32>,
    name_timeout: Duration,
    verbose: bool,
}

#[derive(Debug, PartialEq, Eq)]
enum Command {
    Run(Options),
    Show(String),
}

/// Parses the command line; an error is one sentence for standard error.
fn parse_arguments(mut arguments: impl Iterator<Item = String>) -> Result<Command, String> {
    let mut address = None;
    let mut options = Options {
        address: Address { host: None, port: DEFAULT_PORT },
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
            "--help" | "-h" => return Ok(Command::Show(HELP_TEXT.to_owned())),
            "--version" | "-V" => {
                let version = env!("CARGO_PKG_VERSION");
                return Ok(Command::Show(format!("linechat-server {version}\n")));
            }
            _ if name.starts_with('-') => return Err(format!("there is no option {name}")),
            _ if address.is_some() => {
                return Err(format!("'{name}' is a second address; give only one"))
            }
            _ => address = Some(parse_address(name)?),
        }
    }
    options.address = address.unwrap_or(options.address);
    Ok(Command::Run(options))
}

const DEFAULT_PORT: u16 = 9999;

/// Parses `HOST:PORT`, `HOST`, `:PORT` or `PORT`. A host that holds colons is an IPv6 address, in
/// brackets if a port follows.
fn parse_address(text: &str) -> Result<Address, String> {
    let is_ipv6 = text.parse::<Ipv6Addr>().is_ok();
    let (host, port) = match text.rsplit_once(':') {
        Some((host, port)) if !is_ipv6 && !text.ends_with(']') => (host, Some(port)),
        _ if text.bytes().all(|byte| byte.is_ascii_digit()) => ("", Some(text)),
        _ => (text, None),
    };
    let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
    let is_host = match bare {
        Some(host) => host.parse::<Ipv6Addr>().is_ok(),
        None => is_ipv6 || !host.contains([':', '[', ']', '/', ' ']),
    };
    let port = port.map_or(Ok(DEFAULT_PORT), str::parse);
    match port {
        Ok(port) if is_host => {
            let host = Some(bare.unwrap_or(host).to_owned()).filter(|host| !host.is_empty());
            Ok(Address { host, port })
        }
        _ => {
            Err(format!("'{text}' is not an address to listen on; try 127.0.0.1:9999, ::1 or 9999"))
        }
    }
}

fn parse_number(name: &str, value: Option<String>, least: u32) -> Result<u32, String> {
    let value = value.ok_or(format!("{name} needs a number after it"))?;
    let number = value.parse().ok().filter(|&number| number >= least);
    let most = u32::MAX;
    number.ok_or(format!("{name} takes a whole number from {least} to {most}, not '{value}'"))
}

/// The addresses to try in turn if no host is given. The IPv6 one is tried only where it serves
/// IPv4 too; `bindv6only` is the Linux setting (ip-sysctl).
fn any_addresses(port: u16, bindv6only: Option<&str>) -> Vec<SocketAddr> {
    let serves_both = match bindv6only {
        Some(setting) => setting != "1\n",
        None => cfg!(any(target_os = "linux", target_os = "macos")),
    };
    let ipv6 = serves_both.then_some((Ipv6Addr::UNSPECIFIED, port).into());
    ipv6.into_iter().chain([(Ipv4Addr::UNSPECIFIED, port).into()]).collect()
}

/// Why the server cannot listen, and what to do.
fn explain(address: &Address, error: io::Error) -> String {
    let advice = match error.kind() {
        ErrorKind::AddrInUse => "; is another server running? Give another port",
        ErrorKind::PermissionDenied => "; ports below 1024 need special rights",
        _ => "",
    };
    let host = address.host.as_ref().map_or(String::new(), |host| format!("{host} "));
    format!("cannot listen on {host}port {}: {error}{advice}", address.port)
}

// Everything from here to `main` needs the real operating system, which unit tests do without.

#[cfg(not(test))]
fn bind(address: &Address) -> Result<system::Listener, String> {
    let listener = match &address.host {
        Some(host) => system::Listener::bind((&**host, address.port)),
        None => {
            let bindv6only = std::fs::read_to_string("/proc/sys/net/ipv6/bindv6only").ok();
            system::Listener::bind(&*any_addresses(address.port, bindv6only.as_deref()))
        }
    };
    listener.map_err(|error| explain(address, error))
}

#[cfg(not(test))]
fn run(mut options: Options) -> Result<(), String> {
    /// Descriptors that are not for clients: the standard three, the poller, the listener, the
    /// signals' two, one for a connection that is being refused, and some to spare.
    const RESERVED: usize = 16;
    let limit = system::raise_descriptor_limit();
    let (wanted, most) = (options.max_clients, limit.saturating_sub(RESERVED));
    options.max_clients = wanted.min(most);
    if most == 0 {
        return Err(format!(
            "a limit of {limit} open files is too low to serve a client; raise it above {RESERVED} (ulimit -n)"
        ));
    }
    let listener = bind(&options.address)?;
    let serve = || -> io::Result<()> {
        listener.set_nonblocking(true)?;
        system::set_accept_queue(&listener);
        let address = listener.local_addr()?;
        let (mut console, texts) = Console::new();
        let pending = console.pending.clone();
        let (printed, is_printed) = mpsc::channel();
        thread::Builder::new().name("console".to_owned()).spawn(move || {
            print_texts(texts, &pending, io::stdout());
            let _ = printed.send(());
        })?;
        let signals = system::catch_signals()?;
        console.log(format_args!("listening on {address}"));
        if wanted != usize::MAX && wanted > most {
            console.log(format_args!("at most {most} clients: the limit on open files is {limit}"));
        }
        console.flush();
        let mut server = Server::new(options, listener, signals, console)?;
        while !server.has_stopped() {
            server.turn()?;
        }
        drop(server);
        let _ = is_printed.recv_timeout(STOP_TIMEOUT);
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
// 8. The operating system: the few calls that std lacks, and the only `unsafe`
// ---------------------------------------------------------------------------------------------

/// Constants and structures are from the headers and manual pages named above them.
#[allow(unsafe_code)]
#[cfg_attr(test, allow(dead_code, unused_imports))]
mod system {
    use super::{Interest, Readiness, Watch};
    use std::ffi::c_int;
    use std::io;
    use std::time::{Duration, Instant};

    pub use readiness::Poller;
    pub use signals::{catch_signals, was_signalled, Signals};
    pub use std::net::{TcpListener as Listener, TcpStream as Socket};

    pub fn now() -> Instant {
        Instant::now()
    }

    /// Sockets that the poller can watch, and their numbers.
    #[cfg(unix)]
    pub use std::os::fd::{AsRawFd as Pollable, RawFd as RawSocket};
    #[cfg(windows)]
    pub use std::os::windows::io::{AsRawSocket as Pollable, RawSocket};

    fn raw_socket(socket: &impl Pollable) -> RawSocket {
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

    /// The number of ready sockets: 0 if a signal interrupted the wait.
    pub fn ready_count(waited: io::Result<c_int>) -> io::Result<usize> {
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

    /// Readiness on Linux: epoll(7). `--cfg linechat_poll` selects poll(2) instead.
    #[cfg(all(target_os = "linux", not(linechat_poll)))]
    mod readiness {
        use super::{check, milliseconds, raw_socket, ready_count};
        use super::{Interest, Pollable, Readiness, Watch};
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
        /// for one socket, from `Watch::Begin` to `Watch::End`.
        pub struct Poller {
            epoll: OwnedFd,
            events: Vec<EpollEvent>,
        }

        impl Poller {
            pub fn new() -> io::Result<Self> {
                // SAFETY: takes no pointer; the descriptor it returns is nobody else's.
                let epoll = unsafe { OwnedFd::from_raw_fd(check(epoll_create1(EPOLL_CLOEXEC))?) };
                Ok(Poller { epoll, events: vec![EpollEvent { events: 0, token: 0 }; 4096] })
            }

            pub fn watch(
                &mut self,
                it: &impl Pollable,
                token: usize,
                watch: Watch,
            ) -> io::Result<()> {
                let (operation, interest) = match watch {
                    Watch::Begin(interest) => (EPOLL_CTL_ADD, interest),
                    Watch::Change(interest) => (EPOLL_CTL_MOD, interest),
                    Watch::End => (EPOLL_CTL_DEL, Interest { read: false, write: false }),
                };
                let read = if interest.read { EPOLLIN } else { 0 };
                let write = if interest.write { EPOLLOUT } else { 0 };
                let mut event = EpollEvent { events: read | write, token: token as u64 };
                // SAFETY: `event` outlives the call; the kernel keeps a copy.
                check(unsafe {
                    epoll_ctl(self.epoll.as_raw_fd(), operation, raw_socket(it), &mut event)
                })?;
                Ok(())
            }

            /// Waits until something is ready or the time is over.
            pub fn wait(&mut self, timeout: Option<Duration>) -> io::Result<Vec<Readiness>> {
                let capacity = self.events.len() as c_int;
                let (epoll, events) = (self.epoll.as_raw_fd(), self.events.as_mut_ptr());
                // SAFETY: `events` is writable for `capacity` entries, and outlives the call.
                let waited = unsafe { epoll_wait(epoll, events, capacity, milliseconds(timeout)) };
                let events = self.events.iter().take(ready_count(check(waited))?);
                let ready = events.map(|event| {
                    let EpollEvent { events, token } = *event;
                    let failed = events & (EPOLLERR | EPOLLHUP) != 0;
                    Readiness {
                        token: token as usize,
                        readable: failed || events & EPOLLIN != 0,
                        writable: failed || events & EPOLLOUT != 0,
                        failed,
                    }
                });
                Ok(ready.collect())
            }
        }
    }

    /// Readiness everywhere else: poll(2), which Windows calls WSAPoll. It is told of every socket
    /// at every turn, so a large room costs more than with epoll.
    #[cfg(not(all(target_os = "linux", not(linechat_poll))))]
    mod readiness {
        use super::{check, milliseconds, raw_socket, ready_count};
        use super::{Interest, Pollable, RawSocket, Readiness, Watch};
        use std::collections::{BTreeMap, BTreeSet};
        use std::time::Duration;
        use std::{io, mem, thread};

        /// `struct pollfd` (<poll.h>); `WSAPOLLFD` (<winsock2.h>) has the same fields.
        #[repr(C)]
        struct Entry {
            socket: RawSocket,
            events: i16,
            returned: i16,
        }

        /// What differs between the systems: `nfds_t`, the flags (<poll.h>, <winsock2.h>), and the
        /// function's name. WSAPoll accepts only POLLRDNORM, POLLRDBAND and POLLWRNORM.
        #[cfg(unix)]
        mod flags {
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
        mod flags {
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

        /// POLLHUP is not treated as a failure: on some systems it only means that the peer has
        /// half-closed, and can still be written to.
        const FAILURE: i16 = flags::ERROR | flags::INVALID;

        /// poll reports POLLHUP even if it is not asked for. If the server does not want to read
        /// yet, the next wait omits the socket, and lasts at most this long, so that the loop does
        /// not spin.
        const PAUSE: Duration = Duration::from_millis(50);

        /// Tells which sockets are ready, for as long as they are (level-triggered). A token stands
        /// for one socket, from `Watch::Begin` to `Watch::End`.
        #[derive(Default)]
        pub struct Poller {
            watched: BTreeMap<usize, (RawSocket, Interest)>,
            paused: BTreeSet<usize>,
        }

        impl Poller {
            pub fn new() -> io::Result<Self> {
                Ok(Poller::default())
            }

            pub fn watch(
                &mut self,
                it: &impl Pollable,
                token: usize,
                watch: Watch,
            ) -> io::Result<()> {
                self.paused.remove(&token);
                match watch {
                    Watch::Begin(interest) | Watch::Change(interest) => {
                        self.watched.insert(token, (raw_socket(it), interest))
                    }
                    Watch::End => self.watched.remove(&token),
                };
                Ok(())
            }

            /// Waits until something is ready or the time is over.
            pub fn wait(&mut self, timeout: Option<Duration>) -> io::Result<Vec<Readiness>> {
                let paused = mem::take(&mut self.paused);
                let watched = self.watched.iter().filter(|(token, _)| !paused.contains(token));
                let entry = |(&token, &(socket, interest)): (&usize, &(RawSocket, Interest))| {
                    let read = if interest.read { flags::READ } else { 0 };
                    let write = if interest.write { flags::WRITE } else { 0 };
                    (token, Entry { socket, events: read | write, returned: 0 })
                };
                let (tokens, mut entries): (Vec<_>, Vec<_>) = watched.map(entry).unzip();
                let timeout = match paused.is_empty() {
                    true => timeout,
                    false => Some(timeout.map_or(PAUSE, |timeout| timeout.min(PAUSE))),
                };
                if entries.is_empty() {
                    // WSAPoll fails if there is nothing to poll.
                    thread::sleep(timeout.unwrap_or(PAUSE));
                    return Ok(Vec::new());
                }
                let count = entries.len() as flags::Count;
                // SAFETY: `entries` has `count` entries, is writable, and outlives the call.
                let waited =
                    unsafe { flags::poll(entries.as_mut_ptr(), count, milliseconds(timeout)) };
                let mut ready = Vec::new();
                if ready_count(check(waited))? == 0 {
                    return Ok(ready);
                }
                for (token, entry) in tokens.into_iter().zip(entries) {
                    let failed = entry.returned & FAILURE != 0;
                    let hangup = entry.returned & flags::HANGUP != 0;
                    let reads = entry.events & flags::READ != 0;
                    let readable = failed || entry.returned & flags::READ != 0 || hangup && reads;
                    let writable = failed || entry.returned & flags::WRITE != 0;
                    if readable || writable {
                        ready.push(Readiness { token, readable, writable, failed });
                    } else if hangup {
                        self.paused.insert(token);
                    }
                }
                Ok(ready)
            }
        }
    }

    // Sockets

    // socket(7); <sys/socket.h> on the BSDs and macOS, <winsock2.h>. The numbers for Linux, here
    // and below, are those of x86, ARM and RISC-V.
    const IS_LINUX: bool = cfg!(target_os = "linux");
    const SOL_SOCKET: c_int = if IS_LINUX { 1 } else { 0xffff };
    const SO_KEEPALIVE: c_int = if IS_LINUX { 9 } else { 0x8 };
    const SO_OOBINLINE: c_int = if IS_LINUX { 10 } else { 0x100 };
    const IPPROTO_TCP: c_int = 6;

    /// In this order: keepalive (first probe after 30 s, interval 10 s, 3 probes), the time that
    /// sent data may stay unacknowledged, and the unsent bytes that the kernel may hold. From
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
        // TCP_KEEPIDLE, TCP_KEEPINTVL, TCP_KEEPCNT, TCP_MAXUNACKTIME (s), which FreeBSD 14 brought.
        // Where it is missing, a peer that vanishes while it is being sent to is noticed after some
        // ten minutes.
        &[(256, 30), (512, 10), (1024, 3), (68, 60)]
    } else if cfg!(target_os = "netbsd") {
        &[(3, 30), (5, 10), (6, 3)]
    } else {
        // OpenBSD sets these times for the whole system, by sysctl(8).
        &[]
    };

    #[cfg_attr(windows, link(name = "ws2_32"))]
    extern "system" {
        fn setsockopt(
            socket: RawSocket,
            level: c_int,
            name: c_int,
            value: *const c_int,
            size: c_int,
        ) -> c_int;
        #[cfg(unix)]
        fn listen(socket: RawSocket, queue: c_int) -> c_int;
    }

    /// Sets the options of a client's socket. A vanished peer is noticed after about a minute, on
    /// some BSDs later. Telnet's urgent bytes are read in their place. Where TCP_NOTSENT_LOWAT
    /// exists, the kernel holds little unsent output, and the rest is pending here, where it is
    /// limited. Options that a system lacks are left out.
    pub fn set_socket_options(socket: &Socket) {
        let set = |level: c_int, name: c_int, value: c_int| {
            let size = size_of::<c_int>() as c_int;
            // SAFETY: `value` outlives the call, and its size is the one given.
            unsafe { setsockopt(raw_socket(socket), level, name, &value, size) };
        };
        set(SOL_SOCKET, SO_KEEPALIVE, 1);
        set(SOL_SOCKET, SO_OOBINLINE, 1);
        TCP_OPTIONS.iter().for_each(|&(name, value)| set(IPPROTO_TCP, name, value));
    }

    /// Sets how many connections can wait to be accepted; std asks for 128. During a long turn in a
    /// large room this queue (the backlog) may be full. The kernel then drops connection attempts,
    /// and clients try again only after a second (tcp(7), tcp_syn_retries). The kernel lowers the
    /// number to its own limit (listen(2)). On Windows a second call has no effect.
    pub fn set_accept_queue(listener: &Listener) {
        #[cfg(unix)]
        // SAFETY: takes no pointer; a socket that listens already may be told again.
        unsafe {
            listen(raw_socket(listener), 4096);
        }
        #[cfg(windows)]
        let _ = listener;
    }

    // The limit on open files: getrlimit(2)

    #[cfg(unix)]
    extern "C" {
        // The 64-bit one of the two versions in 32-bit glibc (getrlimit(2), NOTES).
        #[cfg_attr(target_env = "gnu", link_name = "getrlimit64")]
        fn getrlimit(resource: c_int, limit: *mut ResourceLimit) -> c_int;
        #[cfg_attr(target_env = "gnu", link_name = "setrlimit64")]
        fn setrlimit(resource: c_int, limit: *const ResourceLimit) -> c_int;
    }

    /// `struct rlimit` (<sys/resource.h>).
    #[cfg(unix)]
    #[repr(C)]
    struct ResourceLimit {
        soft: u64,
        hard: u64,
    }

    /// Raises the soft limit on open files to the hard one, or else to `OPEN_MAX`. Returns the new
    /// limit. Windows has none.
    pub fn raise_descriptor_limit() -> usize {
        #[cfg(windows)]
        return usize::MAX;
        #[cfg(unix)]
        {
            const RLIMIT_NOFILE: c_int = if IS_LINUX { 7 } else { 8 };
            // macOS refuses a limit of RLIM_INFINITY, and recommends this (setrlimit(2)).
            const OPEN_MAX: u64 = 10_240;
            let mut limit = ResourceLimit { soft: 256, hard: 256 };
            // SAFETY: `limit` outlives the call, which writes it as the structure it is.
            unsafe { getrlimit(RLIMIT_NOFILE, &mut limit) };
            let raise = |to: u64| {
                let raised = ResourceLimit { soft: to.max(limit.soft), hard: limit.hard };
                // SAFETY: `raised` outlives the call, which reads it as the structure it is.
                (unsafe { setrlimit(RLIMIT_NOFILE, &raised) } == 0).then_some(raised.soft)
            };
            let raised = raise(limit.hard).or_else(|| raise(limit.hard.min(OPEN_MAX)));
            usize::try_from(raised.unwrap_or(limit.soft)).unwrap_or(usize::MAX)
        }
    }

    /// Requests to stop: signals on Unix (signal(7)); Ctrl-C, Ctrl-Break and closing the window on
    /// Windows (SetConsoleCtrlHandler, <consoleapi.h>).
    mod signals {
        use std::io;
        use std::sync::atomic::{AtomicBool, Ordering};
        use std::sync::OnceLock;

        #[cfg(windows)]
        pub use std::net::UdpSocket as Signals;
        /// Becomes readable when the server is asked to stop.
        #[cfg(unix)]
        pub use std::os::unix::net::UnixDatagram as Signals;

        static WRITER: OnceLock<Signals> = OnceLock::new();
        static IS_STOPPING: AtomicBool = AtomicBool::new(false);

        /// Wakes the event loop. Returns false if that has been done before: a second signal ends
        /// the process at once. Does only what signal-safety(7) allows: send(2) and lock-free
        /// atomics.
        fn wake() -> bool {
            let is_first = !IS_STOPPING.swap(true, Ordering::SeqCst);
            if let Some(writer) = WRITER.get().filter(|_| is_first) {
                let _ = writer.send(b"!");
            }
            is_first
        }

        /// Returns true if the server has been asked to stop since the last call.
        pub fn was_signalled(signals: &Signals) -> bool {
            signals.recv(&mut [0]).is_ok()
        }

        /// SIGHUP is ignored: a terminal that goes away does not stop the server. std already
        /// ignores SIGPIPE.
        #[cfg(unix)]
        pub fn catch_signals() -> io::Result<Signals> {
            use std::ffi::c_int;

            extern "C" {
                fn signal(number: c_int, handler: usize) -> usize;
                fn _exit(status: c_int) -> !;
            }

            extern "C" fn on_signal(number: c_int) {
                if !wake() {
                    // SAFETY: takes no pointer.
                    unsafe { _exit(128 + number) }
                }
            }

            // <signal.h>: the same on every Unix.
            const SIGHUP: c_int = 1;
            const SIGINT: c_int = 2;
            const SIGTERM: c_int = 15;
            const SIG_IGN: usize = 1;
            let (reader, writer) = Signals::pair()?;
            reader.set_nonblocking(true)?;
            writer.set_nonblocking(true)?;
            let _ = WRITER.set(writer);
            // SAFETY: the handler is a static function, and only calls `wake` and _exit(2).
            unsafe {
                signal(SIGHUP, SIG_IGN);
                for number in [SIGINT, SIGTERM] {
                    signal(number, on_signal as *const () as usize);
                }
            }
            Ok(reader)
        }

        #[cfg(windows)]
        pub fn catch_signals() -> io::Result<Signals> {
            #[link(name = "kernel32")]
            extern "system" {
                fn SetConsoleCtrlHandler(handler: extern "system" fn(u32) -> i32, add: i32) -> i32;
            }

            const CTRL_CLOSE_EVENT: u32 = 2;

            /// Windows calls this in a thread of its own. Returning 0 ends the process.
            extern "system" fn on_event(event: u32) -> i32 {
                let is_first = wake();
                if is_first && event == CTRL_CLOSE_EVENT {
                    // The process ends when this returns. The loop needs up to a second to drain,
                    // and the console up to a second to print (`STOP_TIMEOUT`).
                    std::thread::sleep(std::time::Duration::from_secs(3));
                }
                is_first.into()
            }

            let socket = Signals::bind("127.0.0.1:0")?;
            socket.connect(socket.local_addr()?)?;
            socket.set_nonblocking(true)?;
            let _ = WRITER.set(socket.try_clone()?);
            // SAFETY: the handler is a static function.
            match unsafe { SetConsoleCtrlHandler(on_event, 1) } {
                0 => Err(io::Error::last_os_error()),
                _ => Ok(socket),
            }
        }
    }
}

#[cfg(test)]
#[path = "conformance/linechat/server_tests.rs"]
mod tests;

#[cfg(test)]
#[path = "conformance/linechat/simulation_tests.rs"]
mod simulation_tests;
