//! linechat-client: a window into a linechat room, for a person at a terminal or for a script.
//!
//! At a terminal your input stays on the bottom line; messages appear above it. In a pipe, each line
//! of the input is said, and the output has a line for each event that others cause.
//!
//! The main thread has all the state. The other threads only wait, and pass on what comes:
//!
//!     talk_to_server  --- Event::Server --->  Client::run  --- requests --> talk_to_server
//!     read_input      --- Event::Typed ---->  (Editor, Screen)  ----------> standard output
//!     terminal        --- Event::Redraw --->
//!
//! So a slow server, terminal or person delays nothing else. PROTOCOL.md describes the lines on the
//! wire.

use std::collections::{HashMap, VecDeque};
use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, ErrorKind, IsTerminal, Read, Write};
use std::net::{Shutdown, TcpStream, ToSocketAddrs};
use std::process::ExitCode;
use std::sync::mpsc::{self, Receiver, SyncSender, TryRecvError};
use std::sync::OnceLock;
use std::time::{Duration, Instant};
use std::{env, mem, panic, thread};

/// Bytes of a request before its line ending, of the server's lines with theirs, and of a name
/// (PROTOCOL.md, "Limits").
const MAX_REQUEST: usize = 4000;
const MAX_LINE: u64 = 4096;
const MAX_NAME: usize = 50;
/// The server pushes no roster in a larger room, so the client asks once (PROTOCOL.md, "Joining,
/// leaving, roster").
const MAX_PUSHED_ROSTER: usize = 100;
/// In a larger room, joins and leaves are shown without the roster.
const MAX_SHOWN_ROSTER: usize = 10;
/// Names that the client remembers, whatever a server claims.
const MAX_ROSTER: usize = 100_000;
/// Latest speakers, whose names are completed first.
const MAX_SPEAKERS: usize = 100;
/// Requests that the server may leave unconfirmed before further ones wait.
const MAX_UNCONFIRMED: usize = 64;
/// Events that may wait for the main thread, events that it handles before it draws, and lines of at
/// most 4 KB that may wait for the socket. A server that confirms only what it has read never lets
/// more than `MAX_UNCONFIRMED` and a few lines wait.
const MAX_QUEUED: usize = 256;
/// After this time without a request the client sends a PING.
const SILENCE: Duration = Duration::from_secs(30);
/// Time for the server to accept the connection at one of its addresses.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Time for the server to say HELLO or BYE, to answer NAME, or to confirm the next request, whatever
/// else it sends.
const TIMEOUT: Duration = Duration::from_secs(60);
/// If the timer fires this late, this process was suspended; the server is not to blame.
const PAUSE: Duration = Duration::from_secs(1);
/// If a request is unconfirmed for this long, the prompt shows how many are.
const SLOW: Duration = Duration::from_secs(1);
/// Seconds before each attempt to reconnect; then half a minute.
const RETRY_DELAYS: [u64; 6] = [0, 1, 2, 4, 8, 15];
/// After a loss the old connection may hold the name for this long (PROTOCOL.md, "Writing a client").
const GHOST: Duration = Duration::from_secs(120);
/// Within this time a second Ctrl-C leaves.
const CONFIRM_TIME: Duration = Duration::from_secs(2);

// ---- The conversation --------------------------------------------------------------------------

const LIST: &str = "LIST\n";

/// A line from the server, printable, or why the connection is lost.
type News = Result<String, (Text, String)>;

enum Event {
    /// News of the connection with this number.
    Server(usize, News),
    /// Something was typed, or the input has ended; the bytes wait in a channel of their own.
    Typed,
    /// The window has another size, or shows something else.
    Redraw,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// There is no connection until `Client::due`.
    Waiting,
    /// HELLO has not come yet.
    Connecting,
    Asking,
    Naming,
    Talking,
    Leaving,
}

/// A PING follows each request, and its PONG confirms the request (PROTOCOL.md, "Order, pipelining,
/// fences"). So an ERR belongs to the oldest unconfirmed one, which then becomes a bare PING, and the
/// client knows what a lost connection may have lost.
struct Request {
    /// The line to send, with its ending. Empty for a bare PING.
    wire: String,
    /// The line that was typed. Empty if its loss does not matter.
    typed: String,
    since: Instant,
}

#[derive(Default)]
struct Roster {
    /// Names by their lower case, with which the server compares them.
    names: HashMap<String, String>,
    /// Lower-case names of the latest speakers; the first one spoke last.
    speakers: Vec<String>,
    /// Names received of a list that continues on further lines; 0 between lists.
    arriving: usize,
    /// If true, the next list is shown, because a newcomer has not seen one.
    is_first: bool,
}

/// An error holds the sentences for standard error.
type Outcome = Result<(), Vec<String>>;

/// Starts the connection with this number, and returns the queue of lines to send.
type Connect = Box<dyn FnMut(usize) -> SyncSender<String>>;

struct Client {
    options: Options,
    screen: Screen,
    connect: Connect,
    /// The number of the current connection; news of earlier ones is ignored.
    connection: usize,
    /// To the thread that writes to the server. When this is dropped, the connection is closed.
    out: SyncSender<String>,
    stage: Stage,
    /// The time of the last loss, or of the first WELCOME. `None` before that.
    lost: Option<Instant>,
    /// Attempts to reconnect since a request was last confirmed.
    attempts: usize,
    /// The name that was sent or will be sent. `None` if the user must type one.
    name: Option<String>,
    /// The name that Enter alone gives.
    offer: Option<String>,
    /// Requests that were typed and are not confirmed.
    requests: VecDeque<Request>,
    /// The first ones of these, which were sent.
    sent: usize,
    /// The token of the last PING, which is the number of requests that were sent in all.
    token: usize,
    /// QUIT is sent after all requests.
    is_leaving: bool,
    roster: Roster,
    /// The sender of the last private message.
    confidant: Option<String>,
    /// The deadline of the server for its next answer. If the server owes none, the time at which the
    /// client sends a PING or reconnects.
    due: Instant,
    /// When Ctrl-C was last pressed on an empty line.
    interrupted: Option<Instant>,
    end: Option<Outcome>,
}

impl Client {
    fn new(options: Options, screen: Screen, mut connect: Connect) -> Self {
        Client {
            name: options.name.clone(),
            options,
            screen,
            out: connect(1),
            connect,
            connection: 1,
            stage: Stage::Connecting,
            lost: None,
            attempts: 0,
            offer: None,
            requests: VecDeque::new(),
            sent: 0,
            token: 0,
            is_leaving: false,
            roster: Roster::default(),
            confidant: None,
            due: Instant::now() + TIMEOUT,
            interrupted: None,
            end: None,
        }
    }

    fn run(&mut self, events: &Receiver<Event>, typed: &Receiver<Vec<u8>>) -> Outcome {
        loop {
            match self.screen.flush(&self.prompt()) {
                Ok(()) => {}
                Err(error) if error.kind() == ErrorKind::BrokenPipe => return Err(Vec::new()),
                Err(error) => self.finish(Some(say(text::NO_OUTPUT, &[&explain(&error)]))),
            }
            // Input that follows `/quit` may still come.
            let leaves_input = || typed.recv_timeout(Duration::from_millis(200)).is_ok();
            match self.end.take() {
                None => {}
                Some(Ok(())) if self.options.is_piped && leaves_input() => {
                    return Err(vec![say(text::UNREAD, &[])]);
                }
                Some(outcome) => return outcome,
            }
            let wait = self.wake_up().saturating_duration_since(Instant::now());
            let first = events.recv_timeout(wait);
            for event in first.into_iter().chain(events.try_iter()).take(MAX_QUEUED) {
                self.handle(event);
            }
            self.take_input(typed);
            // A server that never pauses must not keep the deadlines from being looked at.
            self.handle_due(Instant::now());
        }
    }

    /// Ends the client for this reason, which is `None` if the user left.
    fn finish(&mut self, reason: Option<String>) {
        // A user at a terminal has seen each refusal; a script has not.
        let is_troubled = self.screen.has_complained && self.options.is_piped;
        let reason = reason.or(is_troubled.then(|| say(text::SOME_NOT_TAKEN, &[])));
        let line = Some(&self.screen.editor.line).filter(|line| !line.is_empty());
        let line = line.map(|line| (text::NOT_SENT, line.clone()));
        let unsent = self.unsent().into_iter().chain(line).map(|(text, line)| say(text, &[&line]));
        let sentences: Vec<_> = reason.into_iter().chain(unsent).collect();
        self.end.get_or_insert(if sentences.is_empty() { Ok(()) } else { Err(sentences) });
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Server(connection, _) if connection != self.connection => {}
            Event::Server(_, Ok(line)) => self.handle_line(&line),
            Event::Server(_, Err((text, reason))) => self.fail_connection(text, &reason),
            Event::Redraw => self.screen.resize(terminal::columns()),
            Event::Typed => {}
        }
    }

    fn set_stage(&mut self, stage: Stage) {
        self.stage = stage;
        self.renew_due();
    }

    fn renew_due(&mut self) {
        let is_idle = self.sent == 0 && matches!(self.stage, Stage::Asking | Stage::Talking);
        self.due = Instant::now() + if is_idle { SILENCE } else { TIMEOUT };
    }

    fn is_connected(&self) -> bool {
        !matches!(self.stage, Stage::Waiting | Stage::Connecting)
    }

    /// Handles the loss of the connection, or the failure of an attempt, for this reason. At a
    /// terminal a client that has been in the room schedules the next attempt; otherwise the loss
    /// is the end.
    fn disconnect(&mut self, reason: String) {
        let can_return = self.screen.has_editor && !self.options.no_reconnect && !self.is_leaving;
        if !can_return || self.lost.is_none() {
            return self.finish(Some(reason));
        }
        let now = Instant::now();
        if self.stage == Stage::Talking {
            self.lost = Some(now);
            self.screen.complain(text::LOST_FOR_NOW, &[&reason]);
        }
        // The connection may have lost these lines; the key Up brings them back.
        for (text, line) in self.unsent() {
            self.screen.show(PLAIN, &say(text, &[&line]));
            self.screen.editor.remember(&line);
        }
        self.requests.clear();
        self.sent = 0;
        let delay = RETRY_DELAYS.get(self.attempts).copied().unwrap_or(30);
        self.attempts += 1;
        self.connection += 1;
        self.out = mpsc::sync_channel(0).0;
        self.roster.arriving = 0;
        self.stage = Stage::Waiting;
        self.due = now + Duration::from_secs(delay);
    }

    fn fail_connection(&mut self, text: Text, reason: &str) {
        let is_silent = self.stage == Stage::Connecting && text == text::LOST;
        let text = if is_silent { text::NO_HELLO } else { text };
        self.disconnect(say(text, &[&self.options.address(), reason]));
    }

    fn time_out(&mut self) {
        self.fail_connection(text::LOST, &say(text::STOPPED_ANSWERING, &[]));
    }

    /// The time at which the event loop wakes up even without an event.
    fn wake_up(&self) -> Instant {
        let slow = self.requests.front().map(|request| request.since + SLOW);
        let slow = slow.filter(|&at| at > Instant::now());
        [slow, self.screen.asked].into_iter().flatten().fold(self.due, Instant::min)
    }

    /// Reconnects, sends a PING, or gives the server up, if that is due.
    fn handle_due(&mut self, now: Instant) {
        self.screen.asked = self.screen.asked.filter(|&end| end > now);
        let Some(late) = now.checked_duration_since(self.due) else { return };
        match self.stage {
            Stage::Waiting => {
                self.out = (self.connect)(self.connection);
                self.set_stage(Stage::Connecting);
            }
            Stage::Asking | Stage::Talking if self.sent == 0 => {
                let (wire, typed) = Default::default();
                self.requests.push_front(Request { wire, typed, since: now });
                self.send_next();
            }
            _ if late < PAUSE => self.time_out(),
            _ => self.due = now + TIMEOUT,
        }
    }

    fn prompt(&self) -> String {
        if let Some(lines) = &self.screen.editor.paste {
            return say(text::PASTE, &[&lines.len().to_string()]);
        }
        if let Some((pattern, _)) = &self.screen.editor.search {
            return say(text::SEARCH, &[pattern]);
        }
        let is_slow = self.requests.front().is_some_and(|it| it.since.elapsed() >= SLOW);
        match (self.stage, &self.offer) {
            (Stage::Asking, Some(offer)) => say(text::YOUR_NAME_OR, &[offer]),
            (Stage::Asking, None) => say(text::YOUR_NAME, &[]) + " ",
            (Stage::Leaving, _) => say(text::LEAVING, &[]),
            (Stage::Talking, _) if is_slow => {
                say(text::UNCONFIRMED, &[&self.requests.len().to_string()])
            }
            (Stage::Waiting | Stage::Connecting | Stage::Naming, _) if self.lost.is_some() => {
                say(text::NOT_CONNECTED_NOW, &[&self.attempts.to_string()])
            }
            (Stage::Waiting | Stage::Connecting, _) => {
                say(text::CONNECTING, &[&self.options.address()])
            }
            _ => "> ".to_owned(),
        }
    }

    /// Handles a line from the server. One with an unknown keyword is ignored (PROTOCOL.md,
    /// "Versioning and history").
    fn handle_line(&mut self, line: &str) {
        let (keyword, rest) = line.split_once(' ').unwrap_or((line, ""));
        let (first, text) = rest.split_once(' ').unwrap_or((rest, ""));
        let is_last = self.stage == Stage::Connecting || matches!(first, "full" | "timeout");
        let server = self.options.address();
        let closed = |reason: &str| say(text::CLOSED_BY, &[&server, reason]);
        match (self.stage, keyword) {
            (Stage::Leaving, "BYE") => {
                // BYE confirms all requests that were sent before QUIT.
                self.requests.drain(..mem::take(&mut self.sent));
                self.finish(None);
            }
            (_, "BYE") => self.disconnect(closed(&format!("\"{rest}\""))),
            (Stage::Connecting, "HELLO") if first == "linechat/1" => match self.name.take() {
                Some(name) => self.try_name(name),
                None => self.ask_for_name(),
            },
            (_, "ERR") if is_last => self.disconnect(closed(&explain_code(first, text))),
            (Stage::Connecting, _) => self.disconnect(say(text::NOT_LINECHAT, &[&server])),
            (Stage::Naming, "WELCOME") => self.enter_room(first, text),
            (Stage::Naming, "ERR") => self.handle_name_error(first, &explain_code(first, text)),
            (_, "ERR") => self.handle_error(first, text),
            (_, "PONG") => self.confirm(first),
            (_, "USERS") => self.update_roster(first, text),
            _ if !(1..=MAX_NAME).contains(&first.len()) => {}
            (_, "MSG") => self.show_message(first, text),
            (_, "PRIV") => {
                self.screen.show_event(BOLD, &say(text::PRIVATE, &[first, text]));
                self.confidant = Some(first.to_owned());
                self.roster.move_to_front(first);
                self.screen.pending += self.options.bell;
            }
            (_, "SENT") => self.screen.show_own(BOLD, &say(text::PRIVATE_TO, &[first, text])),
            (_, "JOINED") => {
                self.roster.add(first);
                self.show_join_or_leave(text::JOINED, first, text);
            }
            (_, "LEFT") => {
                self.roster.names.remove(&first.to_lowercase());
                self.show_join_or_leave(text::LEFT, first, text);
            }
            _ => {}
        }
    }

    fn show_message(&mut self, name: &str, text: &str) {
        // A full stop, a dash or a quotation mark can be part of a name, but is mostly not.
        let bare = |word| plain_letters(word).trim_matches(|c| !is_part_of_word(c)).to_owned();
        let ours = bare(self.name.as_deref().unwrap_or_default());
        let names_us = text.split(|c| !is_part_of_name(c)).any(|word| bare(word) == ours);
        self.roster.move_to_front(name);
        let text = self.screen.painted(if names_us { BOLD } else { PLAIN }, text);
        self.screen.show_event(PLAIN, &format!("{}: {text}", self.screen.name(name)));
        if names_us {
            self.screen.pending += self.options.bell;
        }
    }

    /// Shows a join or a leave, with the roster if it is known and short.
    fn show_join_or_leave(&mut self, text: Text, name: &str, counted: &str) {
        let count = counted.split(' ').next().unwrap_or_default();
        let number = count.parse().unwrap_or(0);
        let counted = match self.roster.sorted() {
            _ if number == 0 => String::new(),
            names if number == names.len() && number <= MAX_SHOWN_ROSTER => {
                say(text::ONLINE, &[count, &names.join(", ")])
            }
            _ => say(text::HEADCOUNT, &[count]),
        };
        if !self.options.is_quiet {
            self.screen.show_event(DIM, &(say(text, &[name]) + &counted));
        }
    }

    /// Handles one line of a list (PROTOCOL.md, "Joining, leaving, roster"). A newcomer sees the
    /// first list.
    fn update_roster(&mut self, count: &str, names: &str) {
        if self.roster.arriving == 0 {
            self.roster.names.clear();
        }
        for name in names.split(' ').filter(|name| !name.is_empty()) {
            self.roster.arriving += 1;
            self.roster.add(name);
        }
        if count.parse().is_ok_and(|count: usize| self.roster.arriving < count.min(MAX_ROSTER)) {
            return;
        }
        self.roster.arriving = 0;
        if mem::take(&mut self.roster.is_first) {
            self.show_roster();
        }
    }

    fn show_roster(&mut self) {
        let names = self.roster.sorted().into_iter();
        let names: Vec<_> = names.map(|name| self.screen.name(name)).collect();
        let count = names.len().to_string();
        self.screen.show(PLAIN, &say(text::USERS, &[&count, &names.join(", ")]));
    }

    /// Handles an ERR, which answers the oldest unconfirmed request.
    fn handle_error(&mut self, code: &str, text: &str) {
        let request = self.requests.front_mut().filter(|_| self.sent > 0);
        let refused = request.map(|it| (mem::take(&mut it.wire), mem::take(&mut it.typed)));
        let (wire, typed) = refused.unwrap_or_default();
        let to = wire.strip_prefix("PRIV @").and_then(|rest| rest.split(' ').next());
        match to.filter(|_| code == "no-such-user") {
            Some(to) if typed.trim_start().starts_with('/') => {
                self.screen.complain(text::NO_SUCH_COMMAND, &[to, to]);
            }
            Some(to) => self.screen.complain(text::NO_SUCH_USER, &[to]),
            None => self.screen.complain(["{}", "{}"], &[&explain_code(code, text)]),
        }
    }

    /// Handles a PONG: all requests up to the one with this token have been carried out. At a
    /// terminal our own messages are shown now, in their place among those of others.
    fn confirm(&mut self, token: &str) {
        let Ok(token) = token.parse::<usize>() else { return };
        // The server can confirm only requests that it has received.
        while self.token - self.sent < token && token <= self.token {
            let Some(request) = self.requests.pop_front() else { return };
            self.sent -= 1;
            self.renew_due();
            self.attempts = 0;
            if let Some(text) = request.wire.strip_prefix("MSG ") {
                let name = self.screen.name(self.name.as_deref().unwrap_or_default());
                self.screen.show_own(PLAIN, &format!("{name}: {}", text.trim_end_matches('\n')));
            } else if request.wire == LIST {
                self.show_roster();
            }
        }
    }

    /// Asks in the prompt, or without a line editor on a line of its own.
    fn ask_for_name(&mut self) {
        self.set_stage(Stage::Asking);
        if !self.screen.has_editor {
            self.screen.show(PLAIN, &say(text::YOUR_NAME, &[]));
        }
    }

    fn try_name(&mut self, name: String) {
        self.set_stage(Stage::Naming);
        self.queue(format!("NAME {name}\n"));
        self.name = Some(name);
    }

    /// Asks for another name. A script cannot choose one, so the refusal is its end. The name of a
    /// lost connection is tried again, because that connection may still hold it.
    fn handle_name_error(&mut self, code: &str, reason: &str) {
        let name = self.name.clone().unwrap_or_default();
        let is_script = self.options.name.is_some() && !self.screen.has_editor;
        let is_recent = self.lost.is_some_and(|lost| lost.elapsed() < GHOST);
        if is_script || (is_recent && code == "name-taken") {
            return self.disconnect(say(text::NAME_REFUSED, &[&name, reason]));
        }
        self.screen.editor.remember(&name);
        self.name = None;
        self.screen.complain(text::NAME_REFUSED, &[&name, reason]);
        self.ask_for_name();
    }

    fn enter_room(&mut self, name: &str, count: &str) {
        self.set_stage(Stage::Talking);
        self.name = Some(name.to_owned());
        self.roster.is_first = !self.options.is_piped;
        let text = if self.lost.is_some() { text::WELCOME_BACK } else { text::WELCOME };
        self.lost.get_or_insert_with(Instant::now);
        if self.screen.has_editor {
            self.screen.show(DIM, &say(text, &[name]));
            if count.parse().is_ok_and(|count: usize| count > MAX_PUSHED_ROSTER) {
                self.roster.is_first = false;
                self.screen.show(PLAIN, &say(text::USERS, &[count, "/list"]));
                // The answer is for the completion of names.
                self.queue(LIST.to_owned());
            }
        }
    }

    /// Takes keys, or the lines of a pipe as far as the server keeps up with them.
    fn take_input(&mut self, typed: &Receiver<Vec<u8>>) {
        self.send_waiting();
        while self.end.is_none() && self.can_take_more() {
            match typed.try_recv() {
                Ok(bytes) => self.handle_input(&bytes),
                Err(TryRecvError::Disconnected) if !self.is_leaving => self.leave(),
                Err(_) => break,
            }
            self.send_waiting();
        }
    }

    /// A terminal's keys are always taken. Other input is taken line by line, since a line may
    /// decide what the next one means.
    fn can_take_more(&self) -> bool {
        let is_free = matches!(self.stage, Stage::Asking | Stage::Talking);
        self.screen.has_editor || (is_free && self.sent == self.requests.len())
    }

    /// Handles keys or a line, as `read_input` passes them on.
    fn handle_input(&mut self, bytes: &[u8]) {
        if self.screen.has_editor {
            for &byte in bytes {
                match Key::push_byte(&mut self.screen.pending_key, byte) {
                    Some(Key::Position(column)) => self.screen.erase_folded_rows(column),
                    Some(key) => self.handle_key(key),
                    None => {}
                }
            }
            return;
        }
        let Ok(line) = std::str::from_utf8(bytes) else {
            let line = printable(bytes.trim_ascii_end());
            return self.screen.complain(text::LINE_NOT_UTF8, &[&line]);
        };
        match line.trim_end_matches(['\r', '\n']) {
            line if self.options.has_commands || !self.options.is_piped => {
                self.execute(line);
            }
            "" => {}
            line => drop(self.enqueue(format!("MSG {line}\n"), line)),
        }
    }

    fn handle_key(&mut self, key: Key) {
        let editor = &mut self.screen.editor;
        match editor.press(key) {
            Some(Key::ClearScreen) => self.screen.control += CLEAR,
            Some(Key::Interrupt) => {
                // In the room it must be pressed twice.
                let last = self.interrupted.replace(Instant::now());
                let is_confirmed = last.is_some_and(|at| at.elapsed() <= CONFIRM_TIME);
                match is_confirmed || self.lost.is_none() || self.is_leaving {
                    true => self.leave(),
                    false => self.screen.show(DIM, &say(text::CTRL_C_AGAIN, &[])),
                }
            }
            Some(Key::EndOfInput) => self.leave(),
            #[cfg(unix)]
            Some(Key::Suspend) => terminal::suspend(),
            Some(Key::Tab) => self.complete_word(1),
            Some(Key::ShiftTab) => self.complete_word(-1),
            Some(Key::Enter) => match editor.paste.take() {
                Some(lines) => {
                    for line in lines {
                        self.enqueue(format!("MSG {line}\n"), &line);
                    }
                }
                None => {
                    let (line, is_name) = (editor.take_line(), self.name.is_none());
                    match self.execute(&line) {
                        false => self.screen.editor.replace(line),
                        true if is_name => {}
                        true => self.screen.editor.remember(&line),
                    }
                }
            },
            _ => {}
        }
    }

    /// Completes a word, or on an empty line answers the last private message.
    fn complete_word(&mut self, step: isize) {
        match &self.confidant {
            _ if !self.screen.editor.line.is_empty() => {
                let mut names = self.roster.by_speech();
                names.retain(|name| Some(*name) != self.name.as_deref());
                self.screen.editor.complete(&names, step);
            }
            Some(name) => self.screen.editor.insert(&format!("@{name} ")),
            None => {}
        }
    }

    /// Handles a typed line. Returns false if it should stay in the editor.
    fn execute(&mut self, line: &str) -> bool {
        let start = line.trim_start();
        let (word, text) = start.split_once(' ').unwrap_or((start, ""));
        let has_text = !text.trim().is_empty();
        let name = word.strip_prefix(['/', '@']).unwrap_or(word);
        let is_here = self.roster.names.contains_key(&name.to_lowercase());
        let command = match word.to_lowercase().as_str() {
            "/w" if !has_text => "/list",
            "/list" | "/names" | "/who" | "/clientes" | "/usuarios" | "/usuários" => "/list",
            "/help" | "/?" | "/ajuda" => "/help",
            "/quit" | "/bye" | "/exit" | "/q" | "/sair" => "/quit",
            "/w" | "/msg" => "/msg",
            "/me" => "/me",
            _ => "",
        };
        match command {
            "/help" if !has_text => self.screen.show(PLAIN, &say(text::HELP, &[])),
            "/quit" if !has_text => self.leave(),
            _ if !self.is_connected() => {
                self.screen.complain(text::NOT_CONNECTED, &[]);
                return false;
            }
            _ if self.name.is_none() => {
                let name = Some(line.trim().to_owned()).filter(|name| !name.is_empty());
                if let Some(name) = name.or(self.offer.take()) {
                    self.try_name(name);
                }
            }
            _ if start.is_empty() => {}
            "/list" if !has_text => return self.enqueue(LIST.to_owned(), ""),
            "/list" | "/help" | "/quit" => self.screen.complain(text::TAKES_NOTHING, &[name; 2]),
            "/msg" if has_text => {
                let private = text.trim_start().trim_start_matches('@');
                return self.execute(&format!("@{private}"));
            }
            "/me" if has_text => {
                let name = self.name.as_deref().unwrap_or_default();
                return self.enqueue(format!("MSG * {name} {text}\n"), line);
            }
            // A second mark makes the first one text.
            _ if start.starts_with("//") || start.starts_with("@@") => {
                let text = start.get(1..).unwrap_or_default();
                return self.enqueue(format!("MSG {text}\n"), line);
            }
            _ if !start.starts_with(['/', '@']) => {
                return self.enqueue(format!("MSG {line}\n"), line);
            }
            _ if name.is_empty() => self.screen.complain(text::NO_NAME_AFTER, &[word; 3]),
            "" if has_text => {
                // Names do not end with these signs, but many users type them.
                let name = name.trim_end_matches([':', ',']);
                return self.enqueue(format!("PRIV @{name} {text}\n"), line);
            }
            "" if word.starts_with('/') && !is_here => {
                self.screen.complain(text::NO_SUCH_COMMAND, &[name; 2]);
            }
            _ => self.screen.complain(text::NOTHING_SAID, &[word]),
        }
        true
    }

    /// Queues a request. Returns false if it is too long for a line.
    fn enqueue(&mut self, wire: String, typed: &str) -> bool {
        let excess = wire.len().saturating_sub(MAX_REQUEST + 1);
        if excess > 0 {
            self.screen.complain(text::TOO_LONG, &[&excess.to_string()]);
            return false;
        }
        let typed = typed.to_owned();
        self.requests.push_back(Request { wire, typed, since: Instant::now() });
        true
    }

    /// Leaves after what was typed before has been sent; the second time, at once.
    fn leave(&mut self) {
        if self.is_leaving || !self.is_connected() {
            self.finish(None);
        }
        self.is_leaving = true;
    }

    fn send_waiting(&mut self) {
        let count = self.requests.len();
        while self.stage == Stage::Talking && self.sent < count.min(MAX_UNCONFIRMED) {
            self.send_next();
        }
        let is_done = self.stage == Stage::Talking && self.sent == count;
        if self.is_leaving && (is_done || self.stage == Stage::Asking) {
            self.set_stage(Stage::Leaving);
            self.queue("QUIT\n".to_owned());
        }
    }

    fn send_next(&mut self) {
        let Some(request) = self.requests.get(self.sent) else { return };
        self.token += 1;
        let lines = format!("{}PING {}\n", request.wire, self.token);
        self.sent += 1;
        if self.sent == 1 {
            self.renew_due();
        }
        self.queue(lines);
    }

    /// Passes lines to the thread that writes. If the connection is lost, the thread that reads
    /// reports it. A full queue shows that the server has confirmed what it did not read.
    fn queue(&mut self, lines: String) {
        if let Err(mpsc::TrySendError::Full(_)) = self.out.try_send(lines) {
            self.time_out();
        }
    }

    /// Returns the typed lines that did not reach the server, or perhaps did not.
    fn unsent(&self) -> Vec<(Text, String)> {
        let text =
            |number| if number < self.sent { text::PERHAPS_NOT_SENT } else { text::NOT_SENT };
        let unsent = self.requests.iter().enumerate().filter(|(_, it)| !it.typed.is_empty());
        unsent.map(|(number, request)| (text(number), request.typed.clone())).collect()
    }
}

impl Roster {
    fn add(&mut self, name: &str) {
        if self.names.len() < MAX_ROSTER && name.len() <= MAX_NAME {
            self.names.insert(name.to_lowercase(), name.to_owned());
        }
    }

    fn move_to_front(&mut self, name: &str) {
        let name = name.to_lowercase();
        self.speakers.retain(|speaker| *speaker != name);
        self.speakers.insert(0, name);
        self.speakers.truncate(MAX_SPEAKERS);
    }

    fn sorted(&self) -> Vec<&str> {
        let mut names: Vec<_> = self.names.values().map(String::as_str).collect();
        names.sort_by_cached_key(|name| plain_letters(name));
        names
    }

    /// The names of the latest speakers, then the others in the order of the alphabet.
    fn by_speech(&self) -> Vec<&str> {
        let mut names = self.sorted();
        names.sort_by_cached_key(|name| {
            let name = name.to_lowercase();
            self.speakers.iter().position(|it| *it == name).unwrap_or(MAX_SPEAKERS)
        });
        names
    }
}

/// Returns true if a name can perhaps hold this character (PROTOCOL.md, "Names").
fn is_part_of_name(character: char) -> bool {
    let is_separator = character.is_ascii_control() || character.is_whitespace();
    matches!(character, '_' | '-' | '.') || !(is_separator || character.is_ascii_punctuation())
}

fn is_part_of_word(character: char) -> bool {
    character.is_alphanumeric() || width(character) == 0
}

const ACCENTED: &str = "àáâãäåçèéêëìíîïñòóôõöùúûü";
const UNACCENTED: &str = "aaaaaaceeeeiiiinooooouuuu";

/// Lower case without accents, so that `e` finds Érica, however that is encoded.
fn plain_letters(text: &str) -> String {
    let letters = text.chars().flat_map(char::to_lowercase).filter(|&c| width(c) > 0);
    let pairs = ACCENTED.chars().zip(UNACCENTED.chars());
    let plain = |letter| {
        pairs.clone().find(|(accented, _)| *accented == letter).map_or(letter, |pair| pair.1)
    };
    letters.map(plain).collect()
}

/// Returns true if a character could move the cursor, forge a line or reorder text (PROTOCOL.md,
/// "Text"). TAB may be sent and is drawn as spaces.
fn is_unprintable(character: char) -> bool {
    let reorders = matches!(character, '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    reorders || (character.is_control() && character != '\t')
}

/// Text from the network, with escapes for characters that a terminal would act on.
fn printable(bytes: &[u8]) -> String {
    let escape = |character: char| match is_unprintable(character) {
        true => character.escape_default().to_string(),
        false => character.to_string(),
    };
    String::from_utf8_lossy(bytes).chars().map(escape).collect()
}

/// Connects, and passes on what the server says until the connection ends.
fn talk_to_server(host: &str, port: u16, lines: Receiver<String>, report: impl Fn(News)) {
    let socket = match connect(host, port) {
        Ok(socket) => socket,
        Err(reason) => return report(Err((text::CANNOT_CONNECT, reason))),
    };
    let (reader, mut writer) = (&socket, &socket);
    thread::scope(|scope| {
        // If the main thread drops its end, or the connection fails, both threads end.
        scope.spawn(move || {
            let _ = lines.iter().try_for_each(|line| writer.write_all(line.as_bytes()));
            let _ = writer.shutdown(Shutdown::Both);
        });
        let reason = read_from_server(reader, |line| report(Ok(line)));
        report(Err((text::LOST, reason)));
    });
}

/// Connects to the first of the host's addresses that accepts. An error is the reason.
fn connect(host: &str, port: u16) -> Result<TcpStream, String> {
    let mut reason = say(text::NO_SUCH_HOST, &[]);
    for address in (host, port).to_socket_addrs().map_err(|_| reason.clone())? {
        let socket = TcpStream::connect_timeout(&address, CONNECT_TIMEOUT);
        match socket.and_then(|socket| socket.set_nodelay(true).map(|()| socket)) {
            Ok(socket) => return Ok(socket),
            Err(error) => reason = explain(&error),
        }
    }
    Err(reason)
}

/// Passes on the server's lines. Returns why there are no more.
fn read_from_server(socket: &TcpStream, report: impl Fn(String)) -> String {
    let mut socket = BufReader::new(socket);
    loop {
        let mut line = Vec::new();
        match (&mut socket).take(MAX_LINE).read_until(b'\n', &mut line) {
            Err(error) => return explain(&error),
            Ok(_) if line.ends_with(b"\n") => {
                line.pop();
                let line = line.strip_suffix(b"\r").unwrap_or(&line);
                report(printable(line));
            }
            Ok(length) if length as u64 == MAX_LINE => return say(text::LINE_TOO_LONG, &[]),
            Ok(_) => return say(text::CLOSED_CONNECTION, &[]),
        }
    }
}

/// Passes on keys as they come, or other input line by line, until the input ends.
fn read_input(
    mut input: impl BufRead,
    is_raw: bool,
    typed: SyncSender<Vec<u8>>,
    events: SyncSender<Event>,
) {
    loop {
        let mut bytes = Vec::new();
        // An error means that the terminal is gone.
        let _ = match is_raw {
            true => input.fill_buf().map(|keys| bytes.extend(keys)),
            false => input.read_until(b'\n', &mut bytes).map(drop),
        };
        if is_raw {
            input.consume(bytes.len());
        }
        let is_last = !is_raw && !bytes.ends_with(b"\n");
        if bytes.is_empty() || typed.send(bytes).is_err() || is_last {
            break;
        }
        let _ = events.send(Event::Typed);
    }
    drop(typed);
    let _ = events.send(Event::Typed);
}

// ---- The editor --------------------------------------------------------------------------------

/// The line that is being typed: keys in, a row of the screen out.
#[derive(Default)]
struct Editor {
    line: String,
    /// A byte position in `line`.
    cursor: usize,
    history: Vec<String>,
    /// Number of lines that the arrow keys have gone back in the history.
    steps_back: usize,
    /// The text that was last erased by more than a character.
    killed: String,
    last_key: Option<Key>,
    /// The line and the cursor before each change.
    undo: Vec<(String, usize)>,
    /// The line and the cursor before Tab completed a word, and the number of the candidate that is
    /// shown; another Tab tries the next.
    completion: Option<(String, usize, isize)>,
    /// The text that Ctrl-R searches for, and how many lines of the history are searched.
    search: Option<(String, usize)>,
    /// Several pasted lines, until the user confirms or drops them.
    paste: Option<Vec<String>>,
}

impl Editor {
    /// Handles a key. Returns a key that concerns more than the editor.
    fn press(&mut self, key: Key) -> Option<Key> {
        if self.paste.is_some() && key != Key::Enter {
            self.paste.take_if(|_| key == Key::Interrupt);
            return None;
        }
        if let Some(search) = self.search.take() {
            return self.press_in_search(search, key);
        }
        if !matches!(key, Key::Tab | Key::ShiftTab) {
            self.completion = None;
        }
        let before = (self.line.clone(), self.cursor);
        let last = self.last_key.replace(key.clone());
        if key == Key::Undo {
            (self.line, self.cursor) = self.undo.pop().unwrap_or(before);
            return None;
        }
        // The characters of a word are undone together.
        let is_in_word = |key: &Key| matches!(key, Key::Character(c) if *c != ' ');
        let is_more = is_in_word(&key) && last.as_ref().is_some_and(is_in_word);
        let unhandled = self.edit(key, last);
        if self.line != before.0 && !is_more {
            self.undo.push(before);
        }
        unhandled
    }

    fn edit(&mut self, key: Key, last: Option<Key>) -> Option<Key> {
        match key {
            Key::Character(character) => self.insert(character.encode_utf8(&mut [0; 4])),
            Key::Paste(text) => self.take_paste(&text),
            Key::Yank => self.insert(&self.killed.clone()),
            Key::Search => {
                self.undo.push((self.line.clone(), self.cursor));
                self.keep_line();
                self.search = Some((String::new(), self.history.len()));
            }
            Key::Up => {
                self.keep_line();
                self.go_back(self.steps_back + 1);
            }
            Key::Down if self.steps_back > 0 => self.go_back(self.steps_back - 1),
            Key::Interrupt | Key::EndOfInput if self.line.is_empty() => return Some(key),
            Key::Interrupt => self.killed = self.take_line(),
            Key::EndOfInput => self.erase(Place::Right, last),
            Key::Move(to) => self.cursor = self.find(to),
            Key::Erase(to) => self.erase(to, last),
            _ => return Some(key),
        }
        None
    }

    /// Handles a key during a search. A key that does not belong to it accepts the line.
    fn press_in_search(&mut self, search: (String, usize), key: Key) -> Option<Key> {
        let (mut pattern, mut count) = search;
        let mut older = count;
        match key {
            Key::Character(character) => pattern.push(character),
            Key::Erase(Place::Left) => {
                pattern.pop();
                (count, older) = (self.history.len(), self.history.len());
            }
            Key::Search => older = count.saturating_sub(1),
            Key::Interrupt => return self.press(Key::Undo),
            key => return self.press(key),
        }
        // If no older line fits, the last one that was found stays.
        let fits = |line: &String| !pattern.is_empty() && line.contains(&pattern);
        if let Some(at) = self.history.iter().take(older).rposition(fits) {
            self.go_back(self.history.len() - at);
            count = at + 1;
        }
        self.search = Some((pattern, count));
        None
    }

    fn replace(&mut self, line: String) {
        self.cursor = line.len();
        self.line = line;
    }

    fn find(&self, to: Place) -> usize {
        let (before, after) = self.line.split_at_checked(self.cursor).unwrap_or_default();
        let is_gap = |character| !is_part_of_word(character);
        // An accent belongs to the character before it.
        let is_mark = |character| width(character) == 0;
        let end = self.line.len();
        match to {
            Place::Left => {
                let letters = before.trim_end_matches(is_mark);
                letters.char_indices().next_back().map_or(0, |(at, _)| at)
            }
            Place::Right => {
                let mut rest = after.chars();
                rest.next();
                end - rest.as_str().trim_start_matches(is_mark).len()
            }
            Place::Start => 0,
            Place::End => end,
            Place::WordLeft => {
                before.trim_end_matches(is_gap).trim_end_matches(is_part_of_word).len()
            }
            Place::WordRight => {
                let rest = after.trim_start_matches(is_gap).trim_start_matches(is_part_of_word);
                end - rest.len()
            }
            Place::SpaceLeft => {
                before.trim_end().trim_end_matches(|c: char| !c.is_whitespace()).len()
            }
        }
    }

    /// Inserts text at the cursor, without characters that a terminal would act on.
    fn insert(&mut self, text: &str) {
        let text = text.replace(is_unprintable, "");
        self.line.insert_str(self.cursor, &text);
        self.cursor += text.len();
    }

    /// Erases from the cursor to a place. Ctrl-Y inserts what was erased by more than a character;
    /// keys in a row add to it.
    fn erase(&mut self, to: Place, last: Option<Key>) {
        let at = self.find(to);
        let (start, end) = (at.min(self.cursor), at.max(self.cursor));
        let erased: String = self.line.drain(start..end).collect();
        self.cursor = start;
        let is_kept = |to| !matches!(to, Place::Left | Place::Right);
        if !is_kept(to) {
            return;
        }
        if !matches!(last, Some(Key::Erase(to)) if is_kept(to)) {
            self.killed.clear();
        }
        self.killed.insert_str(if at == start { 0 } else { self.killed.len() }, &erased);
    }

    /// Inserts one line, to be edited; for several lines the user is asked.
    fn take_paste(&mut self, text: &str) {
        let lines = text.split(['\r', '\n']).filter(|line| !line.trim().is_empty());
        let lines: Vec<_> = lines.map(|line| line.replace(is_unprintable, "")).collect();
        match lines.as_slice() {
            [line] => self.insert(line),
            _ => self.paste = Some(lines).filter(|lines| !lines.is_empty()),
        }
    }

    /// Begins a new line. Returns the old one.
    fn take_line(&mut self) -> String {
        self.cursor = 0;
        self.steps_back = 0;
        self.undo.clear();
        mem::take(&mut self.line)
    }

    fn remember(&mut self, line: &str) {
        if !line.is_empty() && self.history.last().map(String::as_str) != Some(line) {
            self.history.push(line.to_owned());
        }
    }

    /// Makes a line that is being typed the last of the history, so that Down brings it back.
    fn keep_line(&mut self) {
        if self.steps_back == 0 && !self.line.is_empty() {
            self.remember(&self.line.clone());
            self.steps_back = 1;
        }
    }

    /// Shows the line that was entered this many lines ago; 0 is a new one.
    fn go_back(&mut self, steps: usize) {
        let Some(at) = self.history.len().checked_sub(steps) else { return };
        self.steps_back = steps;
        self.replace(self.history.get(at).cloned().unwrap_or_default());
    }

    /// Completes the command or name at the cursor; again, with the next candidate, or with the one
    /// before if `step` is -1. At the beginning of the line a name gets a colon.
    fn complete(&mut self, names: &[&str], step: isize) {
        let first = (self.line.clone(), self.cursor, if step > 0 { -1 } else { 0 });
        let (line, cursor, shown) = self.completion.take().unwrap_or(first);
        let (before, rest) = line.split_at_checked(cursor).unwrap_or_default();
        let (head, stem) = before.split_at(before.trim_end_matches(is_part_of_name).len());
        let commands: &[&str] = if head == "/" { &COMPLETED } else { &[] };
        let (exact, plain) = (stem.to_lowercase(), plain_letters(stem));
        let words = commands.iter().chain(names);
        let words = words.filter(|word| plain_letters(word).starts_with(&plain));
        let mut candidates: Vec<_> = words.copied().collect();
        // Names with this accent come before those with another.
        candidates.sort_by_key(|word| !word.to_lowercase().starts_with(&exact));
        let shown = (shown + step).rem_euclid(candidates.len().max(1) as isize);
        let Some(name) = candidates.get(shown as usize) else { return };
        let (gap, rest) = match head {
            "" => (": ", rest.trim_start()),
            "@" | "/" => (" ", rest.trim_start()),
            _ => ("", rest),
        };
        let completed = format!("{head}{name}{gap}");
        (self.line, self.cursor) = (format!("{completed}{rest}"), completed.len());
        self.completion = Some((line, cursor, shown));
    }

    /// Returns the text to show before and after the cursor in this many columns, one of which is
    /// the cursor's. A longer line moves by half a window at a time; `<` and `>` show that it goes
    /// on, if the window has space for them.
    fn view(&self, columns: usize) -> (String, String) {
        // A terminal draws a TAB with a width of its own.
        let line = self.line.replace('\t', " ");
        let (before, after) = line.split_at_checked(self.cursor).unwrap_or_default();
        let space = columns.saturating_sub(1);
        let has_marks = space > 3;
        let half = space.div_ceil(2).max(1);
        let skipped = width_of(before).saturating_sub(space).div_ceil(half) * half;
        let mut column = 0;
        let before = before.chars().skip_while(|&c| (column < skipped, column += width(c)).0);
        let mark = (skipped > 0 && has_marks).then_some('<');
        let before: String = mark.into_iter().chain(before.skip(mark.iter().count())).collect();
        let space = columns.saturating_sub(width_of(&before));
        let is_cut = has_marks && width_of(after) > space;
        let space = space - usize::from(is_cut);
        let mut column = 0;
        let after = after.chars().take_while(|&c| (column += width(c), column <= space).1);
        (before, after.chain(is_cut.then_some('>')).collect())
    }
}

const COMPLETED: [&str; 8] = ["list", "help", "quit", "msg", "me", "clientes", "ajuda", "sair"];

// ---- The screen --------------------------------------------------------------------------------

/// Styles, as ECMA-48 numbers them (SGR).
const PLAIN: &str = "";
const BOLD: &str = "1";
const DIM: &str = "2";
const RED: &str = "31";
/// Columns that a prompt must leave to the line that is being typed.
const MIN_TO_TYPE: usize = 8;
/// To the first row and column, and erase from there on (ECMA-48: CUP, ED).
const CLEAR: &str = "\x1b[H\x1b[J";
/// Asks the terminal for the cursor's position, which it sends like a key (DSR, CPR).
const ASK_POSITION: &str = "\x1b[6n";
/// A terminal that has not answered within this time does not answer.
const POSITION_TIMEOUT: Duration = Duration::from_secs(1);

#[derive(Default)]
struct Screen {
    /// The line that is being typed is shown below everything else, and edited with keys.
    has_editor: bool,
    editor: Editor,
    pending_key: Vec<u8>,
    columns: usize,
    /// Columns of the text before the cursor on the bottom row.
    drawn: usize,
    /// Nothing is drawn until this time: the terminal was asked for the cursor's position.
    asked: Option<Instant>,
    has_colours: bool,
    shows_time: bool,
    log: Option<File>,
    /// If true, an error was shown; the exit status of a script says so.
    has_complained: bool,
    /// Text for the next `flush`.
    pending: String,
    /// Control sequences that go before the pending text.
    control: String,
}

impl Screen {
    fn show(&mut self, style: &str, line: &str) {
        self.print("", style, line);
    }

    /// Shows an event, with the time.
    fn show_event(&mut self, style: &str, line: &str) {
        let now = terminal::local_time();
        let time = self.painted(DIM, now.get(11..16).unwrap_or_default()) + " ";
        self.print(if self.shows_time { &time } else { "" }, style, line);
    }

    /// Shows the user's own message. Without the line editor it goes only to the log.
    fn show_own(&mut self, style: &str, line: &str) {
        match self.has_editor {
            true => self.show_event(style, line),
            false => self.record(line),
        }
    }

    /// Shows a line, in as many rows as it takes. Only the first row begins at the left edge, where
    /// the name of the speaker is.
    fn print(&mut self, time: &str, style: &str, line: &str) {
        self.record(line);
        for line in format!("{time}{}", self.painted(style, line)).lines() {
            self.pending += &match self.has_editor {
                true => wrap(line, self.columns),
                false => format!("{line}\n"),
            };
        }
    }

    /// Shows an error. Without the line editor it goes to standard error.
    fn complain(&mut self, text: Text, words: &[&str]) {
        self.has_complained = true;
        let sentence = say(text, words);
        if !self.has_editor {
            self.record(&sentence);
            return print_error(&sentence);
        }
        // The requirements give the words for an unknown recipient.
        let is_bare = text == text::NO_SUCH_USER;
        self.show(RED, &if is_bare { sentence } else { say(text::ERROR, &[&sentence]) });
    }

    /// Appends lines to the log, after the date and the time and without styles.
    fn record(&mut self, text: &str) {
        let Some(log) = &mut self.log else { return };
        let plain = with_widths(text).filter_map(|(character, width)| width.map(|_| character));
        let plain: String = plain.collect();
        let now = terminal::local_time();
        let lines: String = plain.lines().map(|line| format!("{now} {line}\n")).collect();
        if let Err(error) = log.write_all(lines.as_bytes()) {
            self.log = None;
            print_error(&say(text::NO_LOG, &[&explain(&error)]));
        }
    }

    /// Puts text into a style. Without colours bold and dim remain; without the line editor there
    /// are no styles.
    fn painted(&self, style: &str, text: &str) -> String {
        let is_colour = style.len() > 1;
        match self.has_editor && style != PLAIN && (self.has_colours || !is_colour) {
            true => format!("\x1b[{style}m{text}\x1b[0m"),
            false => text.to_owned(),
        }
    }

    /// A name in one of six colours, the same wherever it appears.
    fn name(&self, name: &str) -> String {
        let mix = |sum: usize, byte: u8| sum.wrapping_mul(31).wrapping_add(byte.into());
        let colour = 31 + name.to_lowercase().bytes().fold(0, mix) % 6;
        self.painted(&colour.to_string(), name)
    }

    /// Adapts to a window with this many columns; 0 if the terminal does not know. If the cursor
    /// stood beyond its edge, the terminal may have folded the line into several rows, or may have
    /// cut it (xterm), with messages in the rows above. The cursor's position shows which.
    fn resize(&mut self, columns: usize) {
        self.columns = if columns > 0 { columns } else { 80 };
        if self.drawn >= self.columns {
            self.asked = Some(Instant::now() + POSITION_TIMEOUT);
            self.control += ASK_POSITION;
        }
    }

    /// Handles the answer of the terminal: erases the rows into which it has folded the line.
    fn erase_folded_rows(&mut self, column: usize) {
        if self.asked.take().is_some() && column < self.columns {
            // Before an edge a column is left empty by a wide character that did not fit.
            let rows = (self.drawn + 1).saturating_sub(column).div_ceil(self.columns);
            self.control += &format!("\x1b[{rows}A");
        }
    }

    /// Writes the pending text, the prompt and the line that is being typed, with one write.
    fn flush(&mut self, prompt: &str) -> io::Result<()> {
        let mut shown = mem::take(&mut self.control);
        if !self.has_editor {
            shown = mem::take(&mut self.pending);
        } else if self.asked.is_none() {
            shown += "\r\x1b[J";
            shown += &mem::take(&mut self.pending);
            shown += &self.draw(prompt);
        }
        let mut out = io::stdout().lock();
        out.write_all(shown.as_bytes())?;
        out.flush()
    }

    /// Returns the prompt and the line. The text before the cursor is printed, the cursor saved, the
    /// rest printed, and the cursor restored (`ESC 7`, `ESC 8`), so the cursor is right even if the
    /// terminal gives a character another width than `width` does. Meanwhile nothing wraps. A prompt
    /// that leaves too little space is shown only until something is typed.
    fn draw(&mut self, prompt: &str) -> String {
        let is_wide = width_of(prompt) + MIN_TO_TYPE > self.columns;
        let is_typing = self.editor.paste.is_none() && !self.editor.line.is_empty();
        let prompt = if is_wide && is_typing { "" } else { prompt };
        let (before, after) = match self.editor.paste {
            None => self.editor.view(self.columns.saturating_sub(width_of(prompt))),
            Some(_) => Default::default(),
        };
        self.drawn = width_of(prompt) + width_of(&before);
        format!("\x1b[?7l{prompt}{before}\x1b7{after}\x1b8\x1b[?7h")
    }
}

/// Writes a sentence to standard error.
fn print_error(sentence: &str) {
    let _ = io::stderr().write_all(format!("linechat-client: {sentence}\n").as_bytes());
}

/// Returns a line as rows with this many columns; all except the first are indented. A word that does
/// not fit begins a row, and is broken if it is wider than a row. A URL is not broken: the terminal
/// folds it, and can still open it. Such a URL is ASCII without spaces, so it cannot forge a line.
fn wrap(line: &str, columns: usize) -> String {
    let indent = 4.min(columns / 4);
    let edge = format!("\n{:indent$}", "");
    let (mut rows, mut column) = (String::new(), 0);
    for part in line.replace('\t', "    ").split_inclusive(' ') {
        let (word, width) = (part.trim_end_matches(' '), width_of(part.trim_end_matches(' ')));
        let is_wide_url = word.contains("://") && word.is_ascii() && width > columns - indent;
        let begins_row = rows.is_empty() || rows.ends_with(&edge);
        if column + width > columns && !begins_row && !is_wide_url {
            rows.truncate(rows.trim_end_matches(' ').len());
            rows += &edge;
            column = indent;
        }
        for (character, width) in with_widths(part) {
            if column + width.unwrap_or(0) > columns && !is_wide_url {
                // A space that does not fit is left out.
                if character == ' ' {
                    continue;
                }
                rows += &edge;
                column = indent;
            }
            rows.push(character);
            column += width.unwrap_or(0);
        }
        if is_wide_url {
            column = (column - 1) % columns + 1;
        }
    }
    rows + "\n"
}

// ---- The keys ----------------------------------------------------------------------------------

#[derive(Clone, Debug, PartialEq, Eq)]
enum Key {
    Character(char),
    /// Pasted text, if the terminal marks its beginning and its end.
    Paste(String),
    Enter,
    Tab,
    ShiftTab,
    Up,
    Down,
    Move(Place),
    Erase(Place),
    Yank,
    Undo,
    Search,
    ClearScreen,
    Suspend,
    Interrupt,
    EndOfInput,
    /// The column of the cursor, counted from 1, which the terminal was asked for.
    Position(usize),
    Unknown,
}

/// The place to which a key moves the cursor, or up to which it erases.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Left,
    Right,
    WordLeft,
    WordRight,
    /// The start of the text that has no space in it.
    SpaceLeft,
    Start,
    End,
}

/// The bytes of each key, with `ESC [` for `ESC O` too (the "Special Keys" part of xterm's control
/// sequences, rxvt(7), and "The Keyboard panel" of PuTTY's manual).
static KEYS: [(&[&str], Key); 25] = [
    (&["\r", "\n"], Key::Enter),
    (&["\t"], Key::Tab),
    (&["\x1b[Z"], Key::ShiftTab),
    (&["\x10", "\x1b[A"], Key::Up),
    (&["\x0e", "\x1b[B"], Key::Down),
    (&["\x06", "\x1b[C"], Key::Move(Place::Right)),
    (&["\x02", "\x1b[D"], Key::Move(Place::Left)),
    (&["\x01", "\x1b[H", "\x1b[1~", "\x1b[7~"], Key::Move(Place::Start)),
    (&["\x05", "\x1b[F", "\x1b[4~", "\x1b[8~", "\x1b[Ow"], Key::Move(Place::End)),
    // The arrows with Ctrl, with Alt, and with Ctrl in rxvt.
    (&["\x1bf", "\x1b[1;5C", "\x1b[1;3C", "\x1b[5C", "\x1b[c"], Key::Move(Place::WordRight)),
    (&["\x1bb", "\x1b[1;5D", "\x1b[1;3D", "\x1b[5D", "\x1b[d"], Key::Move(Place::WordLeft)),
    (&["\x08", "\x7f"], Key::Erase(Place::Left)),
    (&["\x1b[3~"], Key::Erase(Place::Right)),
    (&["\x1b\x08", "\x1b\x7f"], Key::Erase(Place::WordLeft)),
    (&["\x1bd"], Key::Erase(Place::WordRight)),
    (&["\x17"], Key::Erase(Place::SpaceLeft)),
    (&["\x15"], Key::Erase(Place::Start)),
    (&["\x0b"], Key::Erase(Place::End)),
    (&["\x19"], Key::Yank),
    (&["\x1f"], Key::Undo),
    (&["\x12"], Key::Search),
    (&["\x0c"], Key::ClearScreen),
    (&["\x1a"], Key::Suspend),
    (&["\x03"], Key::Interrupt),
    (&["\x04"], Key::EndOfInput),
];

const PASTE_BEGINS: &[u8] = b"\x1b[200~";
const PASTE_ENDS: &[u8] = b"\x1b[201~";

impl Key {
    /// Adds a byte from the terminal to those of a key that is not complete. Returns the key that
    /// the byte completes.
    fn push_byte(pending: &mut Vec<u8>, byte: u8) -> Option<Key> {
        let is_cut = matches!(pending.first(), Some(0x80..)) && !matches!(byte, 0x80..=0xbf);
        // The key Esc before another sequence.
        let is_escape = *pending == [0x1b] && byte == 0x1b;
        if is_cut || is_escape {
            pending.clear();
        }
        pending.push(byte);
        let bytes = pending.as_slice();
        let is_complete = match bytes {
            _ if bytes.starts_with(PASTE_BEGINS) => bytes.ends_with(PASTE_ENDS),
            // F1 is `ESC [ [ A` at the console; End is `ESC [ O w` in PuTTY's rxvt mode.
            [0x1b] | [0x1b, b'[' | b'O'] | [0x1b, b'[', b'[' | b'O'] => false,
            // `ESC [ … final` or `ESC O final` (ECMA-48); with Shift, rxvt's end with `$`. Longer
            // sequences are dropped.
            [0x1b, b'[' | b'O', .., last] => matches!(last, b'$' | 0x40..=0x7e) || bytes.len() > 18,
            _ => !std::str::from_utf8(bytes).is_err_and(|error| error.error_len().is_none()),
        };
        if !is_complete {
            return None;
        }
        let bytes = mem::take(pending);
        let paste = bytes.strip_prefix(PASTE_BEGINS);
        if let Some(paste) = paste.and_then(|bytes| bytes.strip_suffix(PASTE_ENDS)) {
            return Some(Key::Paste(String::from_utf8_lossy(paste).into_owned()));
        }
        let text = std::str::from_utf8(&bytes).unwrap_or_default().replace("\x1bO", "\x1b[");
        if let Some((_, key)) = KEYS.iter().find(|(forms, _)| forms.contains(&text.as_str())) {
            return Some(key.clone());
        }
        // The cursor's position is `ESC [ row ; column R` (ECMA-48, CPR).
        let numbers = text.strip_suffix('R').and_then(|numbers| numbers.split_once(';'));
        let column = numbers.and_then(|(_, column)| column.parse().ok());
        let mut characters = text.chars();
        Some(match (column, characters.next(), characters.next()) {
            (Some(column), ..) => Key::Position(column),
            (_, Some(character), None) if !is_unprintable(character) => Key::Character(character),
            _ => Key::Unknown,
        })
    }
}

// ---- The command line --------------------------------------------------------------------------

#[derive(Debug, Default, PartialEq, Eq)]
struct Options {
    host: String,
    port: u16,
    name: Option<String>,
    is_portuguese: bool,
    /// BEL, or empty.
    bell: &'static str,
    has_commands: bool,
    log: Option<String>,
    no_colours: bool,
    no_reconnect: bool,
    no_times: bool,
    is_quiet: bool,
    /// Standard input is not a terminal, which the command line does not say.
    is_piped: bool,
}

impl Options {
    fn address(&self) -> String {
        match self.host.contains(':') {
            true => format!("[{}]:{}", self.host, self.port),
            false => format!("{}:{}", self.host, self.port),
        }
    }

    /// Reads the command line. Returns the text that `--help` or `--version` asks for. An error is a
    /// sentence for standard error, and the word that it is about.
    fn parse(&mut self, arguments: Vec<String>) -> Result<Option<Text>, (Text, String)> {
        if let Some(argument) = arguments.iter().find(|it| it.contains(is_unprintable)) {
            return Err((text::CONTROL_IN_ARGUMENT, printable(argument.as_bytes())));
        }
        let (mut arguments, mut words) = (arguments.into_iter(), Vec::new());
        while let Some(mut argument) = arguments.next() {
            if matches!(argument.as_str(), "--lang" | "--log") {
                argument = format!("{argument}={}", arguments.next().unwrap_or_default());
            }
            match argument.split_once('=').unwrap_or((&argument, "")) {
                ("--bell", _) => self.bell = "\x07",
                ("--commands", _) => self.has_commands = true,
                ("--no-color", _) => self.no_colours = true,
                ("--no-reconnect", _) => self.no_reconnect = true,
                ("--no-time", _) => self.no_times = true,
                ("--quiet", _) => self.is_quiet = true,
                ("--help" | "-h", _) => return Ok(Some(text::USAGE)),
                ("--version" | "-V", _) => return Ok(Some(text::VERSION)),
                ("--lang", language @ ("en" | "pt")) => self.is_portuguese = language == "pt",
                ("--lang", other) => return Err((text::NO_SUCH_LANGUAGE, other.to_owned())),
                ("--log", file) if !file.is_empty() => self.log = Some(file.to_owned()),
                ("--", _) => words.extend(arguments.by_ref()),
                _ if argument.starts_with('-') => return Err((text::NO_SUCH_OPTION, argument)),
                _ => words.push(argument),
            }
        }
        let mut words = words.into_iter().peekable();
        let (host, port) = split_address(&words.next().unwrap_or("localhost".to_owned()));
        // A second word of digits is the port, as for telnet and nc.
        let is_port = |word: &String| port.is_none() && word.bytes().all(|b| b.is_ascii_digit());
        let port = words.next_if(is_port).or(port).unwrap_or("9999".to_owned());
        self.host = host;
        self.port = match port.parse() {
            Ok(port @ 1..) => port,
            _ => return Err((text::BAD_PORT, port)),
        };
        self.name = words.next();
        match words.next() {
            Some(word) => Err((text::TOO_MANY_WORDS, word)),
            None if self.is_piped && self.name.is_none() => Err((text::NO_NAME, String::new())),
            None => Ok(None),
        }
    }
}

/// Returns the host and the port of `HOST`, `HOST:PORT`, `[IPV6]:PORT` or a bare IPv6 address.
fn split_address(address: &str) -> (String, Option<String>) {
    let is_bare_ipv6 = address.matches(':').count() > 1 && !address.starts_with('[');
    let (host, port) = match address.rsplit_once(':') {
        Some((host, port)) if !is_bare_ipv6 && !port.ends_with(']') => (host, Some(port)),
        _ => (address, None),
    };
    let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    (host.to_owned(), port.map(str::to_owned))
}

fn chat(options: Options) -> Outcome {
    let log = options.log.as_ref().map(|file| {
        let log = OpenOptions::new().append(true).create(true).open(file);
        log.map_err(|error| vec![say(text::NO_LOG_FILE, &[file, &explain(&error)])])
    });
    let log = log.transpose()?;
    let (events, happened) = mpsc::sync_channel(MAX_QUEUED);
    let (keyboard, typed) = mpsc::sync_channel(1);
    let is_at_terminal = !options.is_piped && io::stdout().is_terminal();
    // A terminal that understands no control sequences says so.
    let is_dumb = variable("TERM").is_none_or(|kind| kind == "dumb");
    let has_editor = is_at_terminal && !is_dumb && terminal::take_over(events.clone()).is_ok();
    let default_hook = panic::take_hook();
    panic::set_hook(Box::new(move |panic| {
        terminal::give_back();
        default_hook(panic);
    }));
    let has_colours = !options.no_colours && variable("NO_COLOR").is_none();
    let mut screen = Screen { has_editor, has_colours, log, ..Screen::default() };
    screen.shows_time = has_editor && !options.no_times;
    screen.resize(terminal::columns());
    let sender = events.clone();
    thread::spawn(move || read_input(io::stdin().lock(), has_editor, keyboard, events));
    let (host, port) = (options.host.clone(), options.port);
    let connect = move |number| {
        let (out, lines) = mpsc::sync_channel(MAX_QUEUED);
        let (host, events) = (host.clone(), sender.clone());
        let report = move |news| drop(events.send(Event::Server(number, news)));
        thread::spawn(move || talk_to_server(&host, port, lines, report));
        out
    };
    let mut client = Client::new(options, screen, Box::new(connect));
    client.offer = login_name(variable).filter(|_| has_editor);
    let outcome = client.run(&happened, &typed);
    terminal::give_back();
    outcome
}

fn variable(name: &str) -> Option<String> {
    env::var(name).ok().filter(|value| !value.is_empty())
}

/// The login name, if the room could accept it.
fn login_name(variable: impl Fn(&str) -> Option<String>) -> Option<String> {
    let name = ["LOGNAME", "USER"].into_iter().find_map(variable);
    name.filter(|name| name.chars().all(is_part_of_name))
}

/// The locale of messages, from the first of these variables that is set (locale(7)).
fn locale(variable: impl Fn(&str) -> Option<String>) -> String {
    ["LC_ALL", "LC_MESSAGES", "LANG"].into_iter().find_map(variable).unwrap_or_default()
}

fn main() -> ExitCode {
    let is_portuguese = locale(variable).starts_with("pt");
    let is_piped = !io::stdin().is_terminal();
    let mut options = Options { is_portuguese, is_piped, ..Options::default() };
    let arguments = env::args_os().skip(1).map(|word| word.to_string_lossy().into_owned());
    let command = options.parse(arguments.collect());
    let _ = IS_PORTUGUESE.set(options.is_portuguese);
    let (status, outcome) = match command {
        Ok(None) => (1, chat(options)),
        Ok(Some(text)) => {
            let text = say(text, &[env!("CARGO_PKG_VERSION")]);
            let written = io::stdout().write_all(text.as_bytes());
            (1, written.map_err(|error| vec![say(text::NO_OUTPUT, &[&explain(&error)])]))
        }
        Err((text, word)) => (2, Err(vec![say(text, &[&word])])),
    };
    outcome.as_ref().err().into_iter().flatten().for_each(|sentence| print_error(sentence));
    ExitCode::from(if outcome.is_ok() { 0 } else { status })
}

// ---- The terminal: calls that std lacks, and the only `unsafe` ----------------------------------

/// On Unix. The layout of a terminal's settings in memory differs between systems, so stty(1), whose
/// operands are POSIX's, reads and changes them.
#[cfg(unix)]
#[allow(unsafe_code)]
mod terminal {
    use super::Event;
    use std::ffi::c_int;
    use std::io::{self, BufReader, Read, Write};
    use std::os::{fd::IntoRawFd, unix::net::UnixStream};
    use std::process::{self, Command, Stdio};
    use std::sync::{atomic::AtomicI32, atomic::Ordering, mpsc::SyncSender, OnceLock};
    use std::thread;

    extern "C" {
        fn signal(number: c_int, handler: usize) -> usize;
        fn kill(process: c_int, number: c_int) -> c_int;
        fn write(fd: c_int, bytes: *const u8, count: usize) -> isize;
        fn time(now: *mut i64) -> i64;
        /// `struct tm` begins with second, minute, hour, day, month from 0, year from 1900 (<time.h>).
        fn localtime(time: *const i64) -> *const [c_int; 6];
    }

    /// The settings that `give_back` restores.
    static SETTINGS: OnceLock<String> = OnceLock::new();

    /// Takes the terminal over until `give_back`, which a signal that ends the process calls too.
    /// Sends an event when the input line must be drawn again.
    pub fn take_over(events: SyncSender<Event>) -> io::Result<()> {
        let _ = SETTINGS.set(stty(&["-g"])?);
        let (reader, writer) = UnixStream::pair()?;
        SIGNALS.store(writer.into_raw_fd(), Ordering::SeqCst);
        for number in ENDING.into_iter().chain([SIGCONT, SIGWINCH]) {
            // SAFETY: the handler only does what signal-safety(7) allows.
            unsafe { signal(number, on_signal as *const () as usize) };
        }
        thread::spawn(move || {
            for number in BufReader::new(reader).bytes().map_while(Result::ok) {
                match c_int::from(number) {
                    // The shell has changed the terminal's settings meanwhile.
                    SIGCONT => drop(enter_raw_mode()),
                    SIGWINCH => {}
                    number => {
                        give_back();
                        // A shell reports this status for a program that a signal ended.
                        process::exit(128 + number);
                    }
                }
                let _ = events.send(Event::Redraw);
            }
        });
        enter_raw_mode().inspect_err(|_| give_back())
    }

    fn enter_raw_mode() -> io::Result<()> {
        // Keys come as they are pressed, not line by line (-icanon), and are not echoed (-echo).
        // Ctrl-C and Ctrl-Z (-isig), Ctrl-V and Ctrl-O (-iexten), Ctrl-S and Ctrl-Q (-ixon) are
        // keys like others. A read waits for at least one byte.
        stty(&["-icanon", "-echo", "-isig", "-iexten", "-ixon", "min", "1", "time", "0"])?;
        // The terminal marks pasted text (xterm's control sequences, "Bracketed Paste Mode").
        io::stdout().write_all(b"\x1b[?2004h")
    }

    /// Restores the terminal's settings and erases the input line.
    pub fn give_back() {
        if let Some(settings) = SETTINGS.get() {
            let _ = stty(&[settings]);
            let mut out = io::stdout();
            let _ = out.write_all(b"\r\x1b[J\x1b[?7h\x1b[?2004l").and_then(|()| out.flush());
        }
    }

    /// Suspends this process group, as Ctrl-Z does elsewhere, until the shell resumes it. Without a
    /// shell that could, nothing happens.
    pub fn suspend() {
        give_back();
        // SAFETY: the call takes no pointer.
        unsafe { kill(0, SIGTSTP) };
        let _ = enter_raw_mode();
    }

    /// The columns of the window; 0 if the terminal does not know.
    pub fn columns() -> usize {
        let size = stty(&["size"]).unwrap_or_default();
        size.split(' ').nth(1).and_then(|columns| columns.parse().ok()).unwrap_or(0)
    }

    /// The local time as `YYYY-MM-DD HH:MM:SS`.
    pub fn local_time() -> String {
        let mut now = 0;
        // SAFETY: `now` is at least as long as the `time_t` that both calls take, and outlives them.
        // The result is null or valid until the next call, which is here, after it was copied.
        let time = unsafe {
            time(&mut now);
            localtime(&now).as_ref()
        };
        let [second, minute, hour, day, month, year] = time.copied().unwrap_or_default();
        let (year, month) = (1900 + year, 1 + month);
        format!("{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02}")
    }

    fn stty(operands: &[&str]) -> io::Result<String> {
        let output = Command::new("stty").args(operands).stdin(Stdio::inherit()).output()?;
        let text = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        output.status.success().then_some(text).ok_or(io::ErrorKind::Other.into())
    }

    /// SIGHUP, SIGINT, SIGQUIT and SIGTERM end the program. Signals have the same numbers on Linux
    /// (except MIPS), macOS and the BSDs, apart from the two that are swapped below (signal(7)).
    const ENDING: [c_int; 4] = [1, 2, 3, 15];
    const SIGTSTP: c_int = if cfg!(target_os = "linux") { 20 } else { 18 };
    const SIGCONT: c_int = if cfg!(target_os = "linux") { 18 } else { 19 };
    const SIGWINCH: c_int = 28;

    /// The descriptor to which the signal handler writes the number of the signal.
    static SIGNALS: AtomicI32 = AtomicI32::new(-1);

    extern "C" fn on_signal(number: c_int) {
        // SAFETY: the descriptor stays open for ever, and one byte is readable.
        unsafe { write(SIGNALS.load(Ordering::SeqCst), &(number as u8), 1) };
    }
}

/// On Windows. A console in the right mode understands the same control sequences, and sends them for
/// its keys (SetConsoleMode, GetConsoleScreenBufferInfo; <consoleapi.h>, <wincon.h>).
#[cfg(windows)]
#[allow(unsafe_code)]
mod terminal {
    use super::Event;
    use std::io::{self, Write};
    use std::os::windows::io::{AsRawHandle, RawHandle};
    use std::sync::{mpsc::SyncSender, OnceLock};
    use std::{mem, thread, time::Duration};

    #[link(name = "kernel32")]
    extern "system" {
        fn GetConsoleMode(console: RawHandle, mode: *mut u32) -> i32;
        fn SetConsoleMode(console: RawHandle, mode: u32) -> i32;
        fn GetConsoleScreenBufferInfo(console: RawHandle, info: *mut [i16; 11]) -> i32;
        fn GetLocalTime(time: *mut [u16; 8]);
    }

    /// ENABLE_PROCESSED_INPUT (Ctrl-C is no key), ENABLE_LINE_INPUT and ENABLE_ECHO_INPUT.
    const COOKED: u32 = 0x1 | 0x2 | 0x4;
    /// ENABLE_VIRTUAL_TERMINAL_INPUT: keys come as control sequences.
    const SENDS_SEQUENCES: u32 = 0x200;
    /// ENABLE_PROCESSED_OUTPUT and ENABLE_VIRTUAL_TERMINAL_PROCESSING.
    const OBEYS_SEQUENCES: u32 = 0x1 | 0x4;

    /// The modes of input and output that `give_back` restores.
    static MODES: OnceLock<(u32, u32)> = OnceLock::new();

    /// Takes the console over until `give_back`. Sends an event when the window has another size.
    pub fn take_over(events: SyncSender<Event>) -> io::Result<()> {
        let (input, output) = (io::stdin().as_raw_handle(), io::stdout().as_raw_handle());
        let keys = change_mode(input, |mode| mode & !COOKED | SENDS_SEQUENCES)?;
        let screen = change_mode(output, |mode| mode | OBEYS_SEQUENCES)
            .inspect_err(|_| drop(change_mode(input, |_| keys)))?;
        let _ = MODES.set((keys, screen));
        thread::spawn(move || {
            let mut last = columns();
            // Windows has no signal for another width.
            loop {
                thread::sleep(Duration::from_millis(250));
                if mem::replace(&mut last, columns()) != last {
                    let _ = events.send(Event::Redraw);
                }
            }
        });
        Ok(())
    }

    /// Restores the console's modes and erases the input line.
    pub fn give_back() {
        if let Some((keys, screen)) = MODES.get() {
            let mut out = io::stdout();
            let _ = out.write_all(b"\r\x1b[J\x1b[?7h").and_then(|()| out.flush());
            let _ = change_mode(io::stdin().as_raw_handle(), |_| *keys);
            let _ = change_mode(out.as_raw_handle(), |_| *screen);
        }
    }

    /// The columns of the window; 0 if there is no console.
    pub fn columns() -> usize {
        let output = io::stdout().as_raw_handle();
        // `CONSOLE_SCREEN_BUFFER_INFO`: the sixth to eighth numbers are the window's left, top, right.
        let mut info = [0; 11];
        // SAFETY: `info` is as long as the structure that the call fills, and outlives it.
        let is_known = unsafe { GetConsoleScreenBufferInfo(output, &mut info) } != 0;
        let [_, _, _, _, _, left, _, right, ..] = info;
        let columns = usize::try_from(i32::from(right) - i32::from(left) + 1);
        columns.unwrap_or(0) * usize::from(is_known)
    }

    /// The local time as `YYYY-MM-DD HH:MM:SS`.
    pub fn local_time() -> String {
        // `SYSTEMTIME`: year, month, day of the week, day, hour, minute, second, millisecond.
        let mut time = [0; 8];
        // SAFETY: `time` is as long as the structure that the call fills, and outlives it.
        unsafe { GetLocalTime(&mut time) };
        let [year, month, _, day, hour, minute, second, _] = time;
        format!("{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02}")
    }

    /// Changes a console's mode. Returns the old mode.
    fn change_mode(console: RawHandle, change: impl Fn(u32) -> u32) -> io::Result<u32> {
        let mut mode = 0;
        // SAFETY: `mode` outlives the call that fills it; the handle is the process's own.
        let is_changed = unsafe {
            GetConsoleMode(console, &mut mode) != 0 && SetConsoleMode(console, change(mode)) != 0
        };
        is_changed.then_some(mode).ok_or_else(io::Error::last_os_error)
    }
}

// ---- The texts ---------------------------------------------------------------------------------

/// The language of all texts. It is set once, before the first text is used.
static IS_PORTUGUESE: OnceLock<bool> = OnceLock::new();

/// A text in English and in Portuguese. Each `{}` stands for a word, in order.
type Text = [&'static str; 2];

fn say(text: Text, words: &[&str]) -> String {
    let [english, portuguese] = text;
    let is_portuguese = IS_PORTUGUESE.get() == Some(&true);
    let pieces = if is_portuguese { portuguese } else { english }.split("{}");
    // A word precedes every piece except the first.
    [""].iter().chain(words).zip(pieces).flat_map(|(word, piece)| [*word, piece]).collect()
}

/// Explains an ERR (PROTOCOL.md, "Errors"). For an unknown code, quotes the server's own text.
fn explain_code(code: &str, text: &str) -> String {
    let ours = match code {
        "bad-name" => text::BAD_NAME,
        "name-taken" => text::NAME_TAKEN,
        "bad-text" => text::CONTROL_CHARACTERS,
        "full" => text::FULL,
        "timeout" => text::NO_NAME_IN_TIME,
        _ => return format!("\"{}\"", if text.is_empty() { code } else { text }),
    };
    say(ours, &[])
}

/// Explains an error of the operating system; an unusual one in the system's words.
fn explain(error: &io::Error) -> String {
    let ours = match error.kind() {
        ErrorKind::ConnectionRefused => text::REFUSED,
        ErrorKind::TimedOut => text::NO_ANSWER,
        ErrorKind::ConnectionReset | ErrorKind::ConnectionAborted => text::CLOSED_CONNECTION,
        _ => return format!("\"{error}\""),
    };
    say(ours, &[])
}

mod text {
    macro_rules! texts {
        ($($name:ident $english:literal $portuguese:literal)*) => {
            $(pub const $name: super::Text = [$english, $portuguese];)*
            #[cfg(test)]
            pub const ALL: &[super::Text] = &[$($name),*];
        };
    }
    texts! {
    YOUR_NAME "Your name:" "Seu nome:"
    YOUR_NAME_OR "Your name [{}]: " "Seu nome [{}]: "
    CONNECTING "connecting to {} … " "conectando a {} … "
    LEAVING "leaving … " "saindo … "
    UNCONFIRMED "({} unconfirmed) > " "({} sem confirmação) > "
    NOT_CONNECTED_NOW "(not connected, attempt {}) > " "(sem conexão, tentativa {}) > "
    SEARCH "(search '{}') " "(busca '{}') "
    PASTE "Paste {} lines? Enter: yes, Ctrl-C: no " "Colar {} linhas? Enter: sim, Ctrl-C: não "
    WELCOME "Welcome, {}! /help lists the commands; @name text speaks to one person."
        "Olá, {}! /ajuda mostra os comandos; @nome texto fala só com uma pessoa."
    WELCOME_BACK "Connected again, {}." "De volta ao chat, {}."
    CTRL_C_AGAIN "Ctrl-C again, or Ctrl-D, leaves." "Ctrl-C de novo, ou Ctrl-D, sai do chat."
    PRIVATE "[private] {}: {}" "[privado] {}: {}"
    PRIVATE_TO "[private to {}] {}" "[privado para {}] {}"
    JOINED "{} joined the chat." "{} entrou no chat."
    LEFT "{} left the chat." "{} saiu do chat."
    ONLINE " Online ({}): {}" " Conectados ({}): {}"
    HEADCOUNT " ({} online)" " ({} conectados)"
    USERS "Users online ({}): {}" "Usuários conectados ({}): {}"
    ERROR "Error: {}" "Erro: {}"
    NO_SUCH_USER "User {} not found." "Usuário {} não encontrado."
    NO_SUCH_COMMAND "User {} not found, nor a command /{}; see /help"
        "Usuário {} não encontrado, nem existe o comando /{}; veja /ajuda"
    TAKES_NOTHING "/{} stands alone; to write to somebody of that name: @{} text"
        "/{} não leva texto; para escrever para alguém com esse nome: @{} texto"
    NOTHING_SAID "there is no text after '{}'; see /help" "falta o texto depois de '{}'; veja /ajuda"
    NO_NAME_AFTER "a name must follow '{}' without a space; '{}{}' says the sign itself"
        "depois de '{}' vem um nome, sem espaço; '{}{}' envia o próprio sinal"
    NOT_CONNECTED "not connected; the line was not sent" "sem conexão; a linha não foi enviada"
    NAME_REFUSED "the name '{}' was refused: {}" "o nome '{}' foi recusado: {}"
    BAD_NAME "a name has 1 to 50 bytes: letters, digits, _ - . and no spaces; the first is a \
        letter or digit"
        "um nome tem de 1 a 50 bytes: letras, números, _ - . e nenhum espaço; \
        começa com letra ou número"
    NAME_TAKEN "somebody here has that name; choose another"
        "alguém aqui já tem esse nome; escolha outro"
    CONTROL_CHARACTERS "control characters cannot be sent; the line was not"
        "caracteres de controle não podem ser enviados; a linha não foi enviada"
    TOO_LONG "that line is {} bytes too long and was not sent"
        "essa linha passa do limite em {} bytes e não foi enviada"
    LINE_NOT_UTF8 "a line that is not UTF-8 was not sent: {}"
        "uma linha que não está em UTF-8 não foi enviada: {}"
    FULL "no more connections can be taken now; try again later"
        "o servidor está lotado; tente mais tarde"
    NO_NAME_IN_TIME "no name was given in time" "você demorou demais para escolher um nome"
    HELP "\
Type a line and press Enter to say it to everybody.
@name text  says it to one person alone; so do /name text and /msg name text
/me waves   says \"* ana waves\" if your name is ana
/list       shows who is here
/help       shows this
/quit       leaves
//text      says a line that begins with a slash, @@text one that begins with @
Tab completes names; on an empty line it answers the last private message.
Up brings back earlier lines, Ctrl-R searches them, Ctrl-C forgets the line."
    "\
Digite um texto e tecle Enter para enviar a todos.
@nome texto  envia só a uma pessoa; /nome texto e /msg nome texto também
/me acena    envia \"* ana acena\" se o seu nome é ana
/clientes    mostra quem está no chat
/ajuda       mostra esta ajuda
/sair        sai do chat
//texto      envia uma linha que começa com barra, @@texto uma que começa com @
Tab completa nomes; numa linha vazia responde à última mensagem privada.
Seta acima traz linhas anteriores, Ctrl-R as procura, Ctrl-C apaga a linha."
    CANNOT_CONNECT "cannot connect to {}: {}" "não foi possível conectar a {}: {}"
    REFUSED "connection refused; is the server running?" "conexão recusada; o servidor está no ar?"
    NO_SUCH_HOST "no address is known for that name" "endereço não encontrado"
    NO_ANSWER "no answer" "sem resposta"
    LOST "lost the server at {}: {}" "a conexão com {} caiu: {}"
    LOST_FOR_NOW "{}; trying again" "{}; tentando de novo"
    NO_HELLO "no linechat server answers at {}: {}" "nenhum servidor linechat responde em {}: {}"
    NOT_LINECHAT "what answers at {} is not linechat/1" "quem responde em {} não é linechat/1"
    CLOSED_BY "{} closed the connection: {}" "{} fechou a conexão: {}"
    CLOSED_CONNECTION "it closed the connection" "o servidor fechou a conexão"
    LINE_TOO_LONG "it sent a line too long" "o servidor mandou uma linha longa demais"
    STOPPED_ANSWERING "it stopped answering" "o servidor parou de responder"
    NOT_SENT "not sent: {}" "não enviado: {}"
    PERHAPS_NOT_SENT "perhaps not sent: {}" "talvez não enviado: {}"
    SOME_NOT_TAKEN "not all that was typed was taken" "nem tudo que foi digitado foi aceito"
    UNREAD "the rest of the input was not read" "o resto da entrada não foi lido"
    NO_OUTPUT "cannot write to standard output: {}"
        "não foi possível escrever na saída padrão: {}"
    NO_LOG_FILE "cannot open the log {}: {}" "não foi possível abrir o registro {}: {}"
    NO_LOG "the log ends here; it cannot be written: {}"
        "o registro acaba aqui; não foi possível escrever: {}"
    NO_NAME "in a pipe, give a NAME after the host; try --help"
        "num pipe, dê um NOME depois do servidor; veja --help"
    NO_SUCH_OPTION "there is no option {}; try --help" "não existe a opção {}; veja --help"
    NO_SUCH_LANGUAGE "--lang is en or pt, not '{}'" "--lang é en ou pt, e não '{}'"
    BAD_PORT "a port is a number from 1 to 65535, not '{}'"
        "a porta é um número de 1 a 65535, e não '{}'"
    CONTROL_IN_ARGUMENT "'{}' holds a control character; leave it out"
        "'{}' contém um caractere de controle; tire-o"
    TOO_MANY_WORDS "unexpected '{}' after a host, a port and a name; try --help"
        "'{}' sobra: um servidor, uma porta e um nome, nada mais; veja --help"
    VERSION "linechat-client {}\n" "linechat-client {}\n"
    USAGE "\
Usage: linechat-client [OPTIONS] [HOST[:PORT] | HOST PORT] [NAME]

Joins the linechat room at HOST (default: localhost, port 9999) as NAME.
/help lists what can be typed there. In a pipe, every line is said as it is.

Options:
 --bell         ring on a private message or one with your name
 --commands     in a pipe, / and @ mean what they mean at a terminal
 --log FILE     append what is shown to FILE, with date and time
 --no-color     no colours (nor with NO_COLOR or TERM=dumb set)
 --no-reconnect end when the connection is lost (in a pipe, always)
 --no-time      do not show times
 --quiet        do not show joins and leaves
 --lang en|pt   English or Portuguese (default: the locale's)
 --help         show this
 --version      show the version
"
    "\
Uso: linechat-client [OPÇÕES] [SERVIDOR[:PORTA] | SERVIDOR PORTA] [NOME]

Entra na sala de SERVIDOR (se nada for dito: localhost, porta 9999) como NOME.
/ajuda mostra, lá dentro, os comandos. Num pipe, cada linha é enviada como está.

Opções:
 --bell         toca numa mensagem privada ou com o seu nome
 --commands     num pipe, / e @ valem como num terminal
 --log ARQUIVO  acrescenta a ARQUIVO o que é mostrado, com data e hora
 --no-color     sem cores (nem com NO_COLOR ou TERM=dumb)
 --no-reconnect termina quando a conexão cai (num pipe, sempre)
 --no-time      sem a hora das mensagens
 --quiet        não mostra quem entra e quem sai
 --lang en|pt   inglês ou português (se nada for dito: o que diz o locale)
 --help         mostra isto
 --version      mostra a versão
"
    }
}

// ---- The widths of characters ------------------------------------------------------------------

fn width_of(text: &str) -> usize {
    with_widths(text).filter_map(|(_, width)| width).sum()
}

/// The characters of a text with their columns: `None` for those of its styles.
fn with_widths(text: &str) -> impl Iterator<Item = (char, Option<usize>)> + '_ {
    let mut is_style = false;
    text.chars().map(move |character| {
        is_style |= character == '\x1b';
        let width = if is_style { None } else { Some(width(character)) };
        is_style &= character != 'm';
        (character, width)
    })
}

/// The columns that a terminal gives to a character: none to accents and other marks, two to the
/// scripts of East Asia and to emoji (Unicode 15, UAX #11). Whole blocks of symbols count as wide,
/// because a row that ends early does less harm than a row that the terminal breaks. The cursor is
/// right in any case (see `Screen::draw`).
fn width(character: char) -> usize {
    match u32::from(character) {
        0x300..=0x36f | 0x483..=0x489 | 0x591..=0x5bd | 0x610..=0x61a | 0x64b..=0x65f => 0,
        0x6d6..=0x6dc | 0x900..=0x902 | 0x93c | 0x941..=0x948 | 0x94d | 0xe31 => 0,
        0xe34..=0xe3a | 0xe47..=0xe4e | 0x1ab0..=0x1aff | 0x1dc0..=0x1dff | 0x200b..=0x200f => 0,
        0x2060..=0x2064 | 0x20d0..=0x20ff | 0x302a..=0x302d | 0x3099..=0x309a => 0,
        0xfe00..=0xfe0f | 0xfe20..=0xfe2f | 0xfeff | 0xe0000..=0xe01ef => 0,
        0x1100..=0x115f | 0x231a..=0x23ff | 0x25fd..=0x27bf | 0x2b00..=0x2bff => 2,
        0x2e80..=0xa4cf | 0xa960..=0xa97c | 0xac00..=0xd7a3 | 0xf900..=0xfaff => 2,
        0xfe30..=0xfe6f | 0xff00..=0xff60 | 0xffe0..=0xffe6 | 0x1f000..=0x1faff => 2,
        0x20000..=0x3fffd => 2,
        _ => 1,
    }
}

#[cfg(test)]
#[path = "conformance/linechat/client_tests.rs"]
mod tests;
