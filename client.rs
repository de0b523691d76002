//! linechat-client: a window into a linechat room, for a person at a terminal or for a script.
//!
//! Try it, with a server running (see server.rs):
//!
//!     cargo run --release --bin linechat-client              (or: make run-client)
//!     echo hello | linechat-client localhost bot
//!
//! At a terminal the line being typed stays at the bottom, and what arrives is shown above it.
//! Without one it is a plain program: one line in, one line out.
//!
//! Threads that do nothing but wait hand what comes to the main thread, which has all the state:
//!
//!     talk_to_server    --- Event::Arrived -->  Client::run  --- requests --> write_to_server
//!     listen_to_person  --- Event::Typed ---->  (Editor, Screen)  ----------> standard output
//!     terminal          --- Event::Redraw --->
//!
//! So nothing that is slow keeps anything else waiting. PROTOCOL.md says what goes over the wire.
//!
//! Top to bottom: the limits, the conversation, the editor, the screen, the keys, the command line,
//! the terminal, the texts, the widths of characters.

use std::collections::{HashMap, VecDeque};
use std::io::{self, BufRead, BufReader, ErrorKind, IsTerminal, Read, Write};
use std::net::{Shutdown, TcpStream, ToSocketAddrs};
use std::ops::RangeInclusive;
use std::process::ExitCode;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender, SyncSender};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};
use std::{env, mem, panic, thread};

const DEFAULT_HOST: &str = "localhost";
const DEFAULT_PORT: u16 = 9999;
/// Bytes of a request before its line ending, of the server's lines with theirs, and of a name
/// (PROTOCOL.md, "Limits").
const MAX_REQUEST: usize = 4000;
const MAX_LINE: u64 = 4096;
const MAX_NAME: usize = 50;
/// In a larger room the roster is not pushed, and has to be asked for (PROTOCOL.md, "Roster").
const MAX_PUSHED_ROSTER: usize = 100;
/// Names remembered, whatever a server claims.
const MAX_ROSTER: usize = 100_000;
/// Requests on their way to a server that has not confirmed them; further ones wait.
const MAX_UNCONFIRMED: usize = 64;
/// Events read ahead of being dealt with; and how many are dealt with before the screen is drawn.
const EVENTS_AHEAD: usize = 256;
/// After so much silence the server is asked for a sign of life.
const SILENCE: Duration = Duration::from_secs(30);
/// How long the server may take to accept the connection at one of its addresses, to greet, to give
/// that sign, or to say BYE.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Who wakes so much too late was stopped, with the whole machine perhaps, and has not waited.
const PAUSE: Duration = Duration::from_secs(1);
/// A line that has waited so long for its confirmation is counted in the prompt.
const SLOW: Duration = Duration::from_secs(1);
/// What a terminal sends for one key comes within this time; ESC alone is the key Esc.
const ESCAPE_TIMEOUT: Duration = Duration::from_millis(100);

// ---- The conversation --------------------------------------------------------------------------

/// What the main thread waits for.
enum Event {
    /// The server has accepted the connection.
    Connected,
    /// A line of the server, printable.
    Arrived(String),
    /// There is no connection, or no longer, as this sentence says.
    Lost(String),
    /// Something was typed; it waits in a channel of its own.
    Typed,
    /// The window has another size, or shows something else.
    Redraw,
}

/// Where the conversation stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Connecting,
    /// Connected, and nothing has come from the server yet.
    Greeting,
    /// A name is to be typed.
    Asking,
    /// A name was sent.
    Naming,
    Talking,
    /// QUIT was sent; the server's BYE is awaited.
    Leaving,
}

/// How the conversation ended.
#[derive(Debug, PartialEq, Eq)]
enum End {
    /// The server said BYE to our QUIT, or had nothing to say it to.
    Left,
    /// For this reason.
    Failed(String),
}

/// What a typed line asks for.
#[derive(Debug, PartialEq, Eq)]
enum Typed {
    Nothing,
    Request(Request),
    Help,
    Quit,
    /// Nothing can be done with it, for this reason, which is about this word.
    Mistake(Text, String),
}

/// What can be asked of the server once one has a name.
#[derive(Debug, PartialEq, Eq)]
enum Request {
    Say(String),
    /// A private message, typed behind this mark: `@` or `/`.
    Whisper {
        mark: char,
        to: String,
        text: String,
    },
    List,
    /// A list that is not shown, so that names can be completed.
    Roster,
    /// Nothing but a sign of life.
    Heartbeat,
    Quit,
}

/// A request that the server has not confirmed. Each is followed by a PING, whose PONG tells that
/// it has been carried out (PROTOCOL.md, "Order, pipelining, fences"); so an ERR is always about the
/// first of them, of which then only the sign of life is left, and what a connection loses is known.
struct Sent {
    request: Request,
    since: Instant,
}

/// Who is in the room, as far as is known.
#[derive(Default)]
struct Roster {
    /// Names by their lower case, with which the server compares them.
    names: HashMap<String, String>,
    /// How many names have come of a list that is still to go on; 0 between lists.
    arriving: usize,
    /// The next list shows the newcomer who is here.
    is_first: bool,
}

struct Client {
    options: Options,
    screen: Screen,
    /// To the thread that writes to the server.
    out: Sender<String>,
    stage: Stage,
    /// The name that is tried, or was accepted.
    name: Option<String>,
    /// The name that Enter alone gives.
    offer: Option<String>,
    /// Typed, and not yet sent. If there is a Quit, it is the last.
    waiting: VecDeque<Request>,
    unconfirmed: VecDeque<Sent>,
    /// Requests that were sent. Its number is the token of a request's PING.
    requests: usize,
    /// Something was not taken, which a script should know.
    is_troubled: bool,
    /// The person knows that the terminal does not send UTF-8.
    is_warned: bool,
    roster: Roster,
    /// Who wrote privately last.
    confidant: Option<String>,
    /// When the server has been silent for too long.
    deadline: Instant,
}

impl Client {
    fn new(options: Options, screen: Screen, out: Sender<String>) -> Self {
        Client {
            name: options.name.clone(),
            options,
            screen,
            out,
            stage: Stage::Connecting,
            offer: None,
            waiting: VecDeque::new(),
            unconfirmed: VecDeque::new(),
            requests: 0,
            is_troubled: false,
            is_warned: false,
            roster: Roster::default(),
            confidant: None,
            deadline: Instant::now() + TIMEOUT,
        }
    }

    /// Talks until the end.
    fn run(&mut self, events: &Receiver<Event>, typed: &Receiver<Vec<u8>>) -> End {
        loop {
            let turn = self.turn(events, typed);
            // What came last is still to be seen.
            let shown = self.screen.flush(&self.prompt());
            let shown = shown.map_err(|error| failed(text::NO_OUTPUT, &[&explain(&error)]));
            if let Err(end) = shown.and(turn) {
                return end;
            }
        }
    }

    /// Waits for something, then deals with whatever there is. An error is the end.
    fn turn(&mut self, events: &Receiver<Event>, typed: &Receiver<Vec<u8>>) -> Result<(), End> {
        match events.recv_timeout(self.wake_up().saturating_duration_since(Instant::now())) {
            Ok(event) => self.happened(event)?,
            Err(RecvTimeoutError::Timeout) => self.time_passed(Instant::now())?,
            Err(RecvTimeoutError::Disconnected) => return Err(End::Left),
        }
        for event in events.try_iter().take(EVENTS_AHEAD) {
            self.happened(event)?;
        }
        while self.can_take_more() {
            let Ok(bytes) = typed.try_recv() else { break };
            self.typed(bytes)?;
            self.send_waiting();
        }
        self.send_waiting();
        Ok(())
    }

    fn happened(&mut self, event: Event) -> Result<(), End> {
        match event {
            Event::Connected => self.enter(Stage::Greeting),
            Event::Arrived(line) => {
                self.arrived(&line)?;
                self.enter(self.stage);
            }
            Event::Lost(sentence) => return Err(End::Failed(sentence)),
            // Some terminals fold the line being typed anew, and its first rows stay above the
            // cursor; others (xterm) have messages there, so nothing above is erased.
            Event::Redraw => {
                if let Some(input) = &mut self.screen.input {
                    input.columns = terminal::columns();
                }
            }
            Event::Typed => {}
        }
        Ok(())
    }

    // Time

    /// The stage, which gives the server its time anew.
    fn enter(&mut self, stage: Stage) {
        self.stage = stage;
        let is_due = matches!(stage, Stage::Greeting | Stage::Leaving);
        self.deadline = Instant::now() + if is_due { TIMEOUT } else { SILENCE };
    }

    /// When there is something to do even if nothing happens.
    fn wake_up(&self) -> Instant {
        let slow = self.unconfirmed.front().map(|sent| sent.since + SLOW);
        let slow = slow.filter(|&at| at > Instant::now());
        let escape = self.screen.input.as_ref().and_then(|input| input.keys.deadline());
        [slow, escape].into_iter().flatten().fold(self.deadline, Instant::min)
    }

    /// Nothing has happened in time: the server is asked for a sign of life, or given up.
    fn time_passed(&mut self, now: Instant) -> Result<(), End> {
        if let Some(key) = self.screen.input.as_mut().and_then(|input| input.keys.time_out(now)) {
            self.press(key)?;
        }
        let Some(late) = now.checked_duration_since(self.deadline) else { return Ok(()) };
        let is_heartbeat = |sent: &Sent| sent.request == Request::Heartbeat;
        let is_asked = matches!(self.stage, Stage::Greeting | Stage::Leaving)
            || self.unconfirmed.iter().any(is_heartbeat);
        match self.stage {
            // The thread that connects has time-outs of its own.
            Stage::Connecting => {}
            _ if !is_asked => self.send(Request::Heartbeat),
            _ if late < PAUSE => {
                let reason = say(text::STOPPED_ANSWERING, &[]);
                return Err(failed(text::LOST, &[&self.options.address, &reason]));
            }
            _ => {}
        }
        self.deadline = now + TIMEOUT;
        Ok(())
    }

    /// What stands before the line being typed.
    fn prompt(&self) -> String {
        let editor = self.screen.input.as_ref().map(|input| &input.editor);
        if let Some(lines) = editor.and_then(|editor| editor.paste.as_ref()) {
            return say(text::PASTE, &[&lines.len().to_string()]);
        }
        let is_slow = self.unconfirmed.front().is_some_and(|sent| sent.since.elapsed() >= SLOW);
        let requests = self.unconfirmed.iter().map(|sent| &sent.request).chain(&self.waiting);
        let server = &self.options.address;
        match (self.stage, &self.offer) {
            (Stage::Connecting | Stage::Greeting, _) => say(text::CONNECTING, &[server]),
            (Stage::Asking, Some(offer)) => say(text::YOUR_NAME_OR, &[offer]),
            (Stage::Asking, None) => say(text::YOUR_NAME, &[]) + " ",
            (Stage::Leaving, _) => say(text::LEAVING, &[]),
            _ if !is_slow => "> ".to_owned(),
            _ => match requests.filter_map(Request::text).count() {
                0 => say(text::NO_ANSWER_YET, &[]),
                count => say(text::UNCONFIRMED, &[&count.to_string()]),
            },
        }
    }

    // What arrives

    /// A line of the server. One with an unknown keyword is ignored (PROTOCOL.md, "Versioning").
    fn arrived(&mut self, line: &str) -> Result<(), End> {
        let (keyword, rest) = line.split_once(' ').unwrap_or((line, ""));
        let (first, text) = rest.split_once(' ').unwrap_or((rest, ""));
        let is_name = (1..=MAX_NAME).contains(&first.len());
        let server = self.options.address.as_str();
        match (self.stage, keyword) {
            (Stage::Leaving, "BYE") => return Err(End::Left),
            (_, "BYE") => return Err(failed(text::CLOSED_BY, &[server, &format!("\"{rest}\"")])),
            (Stage::Greeting, "HELLO") if first == "linechat/1" => match self.name.take() {
                Some(name) => self.try_name(name),
                None => self.ask_for_name(),
            },
            (_, "ERR") if self.stage == Stage::Greeting || matches!(first, "full" | "timeout") => {
                return Err(failed(text::CLOSED_BY, &[server, &explain_code(first, text)]));
            }
            (Stage::Greeting, _) => return Err(failed(text::NOT_LINECHAT, &[server])),
            (Stage::Naming, "WELCOME") => self.welcomed(first, text),
            (Stage::Naming, "ERR") => self.name_refused(&explain_code(first, text))?,
            (_, "ERR") => self.refused(first, text),
            (_, "PONG") => self.confirmed(first),
            (_, "USERS") => self.list(first, text),
            (_, "MSG") if is_name => self.said(first, text),
            (_, "PRIV") if is_name => {
                self.screen.show_event(STANDS_OUT, &say(text::PRIVATE, &[first, text]));
                self.confidant = Some(first.to_owned());
                self.ring();
            }
            (_, "SENT") if is_name => {
                self.screen.show_event(STANDS_OUT, &say(text::PRIVATE_TO, &[first, text]));
            }
            (_, "JOINED") if is_name => {
                self.roster.add(first);
                self.came_or_went(text::JOINED, first, text);
            }
            (_, "LEFT") if is_name => {
                self.roster.names.remove(&first.to_lowercase());
                self.came_or_went(text::LEFT, first, text);
            }
            _ => {}
        }
        Ok(())
    }

    fn said(&mut self, name: &str, text: &str) {
        let ours = plain_letters(self.name.as_deref().unwrap_or_default());
        let mut words = text.split(|c: char| !is_part_of_name(c)).map(plain_letters);
        // A full stop can end a name, and mostly ends a sentence.
        let names_us = words.any(|word| word == ours || word.trim_end_matches('.') == ours);
        self.show_message(name, text, if names_us { STANDS_OUT } else { PLAIN });
        if names_us {
            self.ring();
        }
    }

    fn ring(&mut self) {
        if self.options.rings {
            self.screen.pending.push('\x07');
        }
    }

    fn show_message(&mut self, name: &str, text: &str, style: &str) {
        let (name, text) = (self.screen.name(name), self.screen.painted(style, text));
        self.screen.show_event(PLAIN, &format!("{name}: {text}"));
    }

    /// Shows who came or went, with the roster where it is known and fits beside it.
    fn came_or_went(&mut self, text: Text, name: &str, counted: &str) {
        let mut line = say(text, &[name]);
        let count = counted.split(' ').next().unwrap_or_default();
        if let Ok(number) = count.parse::<usize>() {
            let is_known = number == self.roster.names.len() && number <= MAX_PUSHED_ROSTER;
            let names = || self.roster.sorted().join(", ");
            let roster = is_known.then(|| say(text::ONLINE, &[count, &names()]));
            let room = self.screen.room().saturating_sub(width_of(&line));
            let roster = roster.filter(|roster| width_of(roster) <= room);
            line += &roster.unwrap_or_else(|| say(text::HEADCOUNT, &[count]));
        }
        self.screen.show_event(NOTICE, &line);
    }

    /// A part of a list (PROTOCOL.md, "Roster"). It is shown when the last part has come, if it was
    /// asked for or is the first.
    fn list(&mut self, count: &str, names: &str) {
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
        let awaited = self.unconfirmed.front().map(|sent| &sent.request);
        if mem::take(&mut self.roster.is_first) || awaited == Some(&Request::List) {
            let names = self.roster.sorted().into_iter();
            let names: Vec<_> = names.map(|name| self.screen.name(name)).collect();
            self.screen.show(PLAIN, &say(text::USERS, &[count, &names.join(", ")]));
        }
    }

    fn complain(&mut self, text: Text, words: &[&str]) {
        self.is_troubled = true;
        self.screen.show(ERROR, &say(text, words));
    }

    fn complain_of_error(&mut self, text: Text, words: &[&str]) {
        self.complain(text::ERROR, &[&say(text, words)]);
    }

    /// An ERR that answers the first request which is not confirmed.
    fn refused(&mut self, code: &str, text: &str) {
        let first = self.unconfirmed.front_mut();
        let refused = first.map(|sent| mem::replace(&mut sent.request, Request::Heartbeat));
        match (refused, code) {
            (Some(Request::Whisper { mark: '/', to, .. }), "no-such-user") => {
                self.complain_of_error(text::NO_SUCH_COMMAND, &[&to, &to]);
            }
            (Some(Request::Whisper { to, .. }), "no-such-user") => {
                self.complain(text::NO_SUCH_USER, &[&to]);
            }
            _ => self.complain(text::ERROR, &[&explain_code(code, text)]),
        }
    }

    /// A PONG: everything up to the request with this token has been carried out. Our own messages
    /// are shown now, in their place among what others said.
    fn confirmed(&mut self, token: &str) {
        let Ok(token) = token.parse::<usize>() else { return };
        while self.requests - self.unconfirmed.len() < token {
            let Some(sent) = self.unconfirmed.pop_front() else { return };
            let name = self.name.clone().filter(|_| self.screen.input.is_some());
            if let (Request::Say(text), Some(name)) = (sent.request, name) {
                self.show_message(&name, &text, PLAIN);
            }
        }
    }

    // The name

    /// Asks beside the line being typed, or on a line of its own.
    fn ask_for_name(&mut self) {
        self.stage = Stage::Asking;
        if self.screen.input.is_none() {
            self.screen.show(PLAIN, &say(text::YOUR_NAME, &[]));
        }
    }

    fn try_name(&mut self, name: String) {
        self.stage = Stage::Naming;
        let _ = self.out.send(format!("NAME {name}\n"));
        self.name = Some(name);
    }

    /// Asks for another name, unless a script was given this one to be called by.
    fn name_refused(&mut self, reason: &str) -> Result<(), End> {
        let name = self.name.take().unwrap_or_default();
        match &mut self.screen.input {
            Some(input) => input.editor.remember(&name),
            None if self.options.name.is_none() => {}
            None => return Err(failed(text::NAME_REFUSED, &[&name, reason])),
        }
        self.complain_of_error(text::NAME_REFUSED, &[&name, reason]);
        self.ask_for_name();
        Ok(())
    }

    fn welcomed(&mut self, name: &str, count: &str) {
        self.stage = Stage::Talking;
        self.name = Some(name.to_owned());
        self.is_troubled = false;
        self.roster.is_first = true;
        if self.screen.input.is_some() {
            self.screen.show(NOTICE, &say(text::WELCOME, &[name]));
            if count.parse().is_ok_and(|count: usize| count > MAX_PUSHED_ROSTER) {
                self.roster.is_first = false;
                self.screen.show(PLAIN, &say(text::USERS, &[count, "/list"]));
                self.send(Request::Roster);
            }
        }
    }

    // What is typed

    /// Without a terminal, a line is taken only when it can be dealt with, since what is behind it
    /// depends on that; at one, keys are always taken.
    fn can_take_more(&self) -> bool {
        let is_free = matches!(self.stage, Stage::Asking | Stage::Talking);
        self.screen.input.is_some() || (is_free && self.waiting.is_empty())
    }

    /// Keys of the terminal, or one line of something else; nothing at all at the end of it.
    fn typed(&mut self, bytes: Vec<u8>) -> Result<(), End> {
        if bytes.is_empty() {
            return self.leave();
        }
        match &mut self.screen.input {
            Some(input) => input.keys.add(&bytes),
            None => match terminal::decode(&bytes) {
                Some(line) => return self.entered(line.trim_end_matches(['\r', '\n'])),
                None => {
                    let line = printable(bytes.trim_ascii_end());
                    self.complain_of_error(text::LINE_NOT_UTF8, &[&line]);
                }
            },
        }
        while let Some(key) = self.screen.input.as_mut().and_then(|input| input.keys.next()) {
            self.press(key)?;
        }
        Ok(())
    }

    fn press(&mut self, key: Key) -> Result<(), End> {
        let Some(input) = &mut self.screen.input else { return Ok(()) };
        match input.editor.press(key) {
            Some(Key::ClearScreen) => self.screen.pending.insert_str(0, CLEAR),
            Some(Key::Interrupt | Key::EndOfInput) => self.leave()?,
            Some(Key::Suspend) => terminal::suspend(),
            Some(Key::Tab) => self.complete(),
            Some(Key::NotUtf8) => self.warn_of_terminal(),
            Some(Key::Enter) => match input.editor.paste.take() {
                Some(lines) => lines.into_iter().for_each(|line| self.enqueue(Request::Say(line))),
                None => {
                    let line = input.editor.enter();
                    if !line.is_empty() && self.name.is_some() {
                        input.editor.remember(&line);
                    }
                    self.entered(&line)?;
                }
            },
            _ => {}
        }
        Ok(())
    }

    /// Offers the others' names, first of all that of who wrote privately last.
    fn complete(&mut self) {
        let confidant = self.confidant.as_deref().filter(|name| self.roster.has(name));
        let names = confidant.into_iter().chain(self.roster.sorted());
        let names: Vec<_> = names.filter(|name| Some(*name) != self.name.as_deref()).collect();
        let Some(Input { editor, .. }) = &mut self.screen.input else { return };
        if confidant.is_some() || !editor.line.is_empty() {
            editor.complete(&names);
        }
    }

    fn warn_of_terminal(&mut self) {
        if !mem::replace(&mut self.is_warned, true) {
            self.complain(text::TERMINAL_NOT_UTF8, &[]);
        }
    }

    fn entered(&mut self, line: &str) -> Result<(), End> {
        match parse(line, &self.roster) {
            Typed::Help => self.screen.show(PLAIN, &say(text::HELP, &[])),
            Typed::Quit => {
                // Who asks to leave has seen what was refused; a script that just ends has not.
                self.is_troubled = false;
                return self.leave();
            }
            _ if self.name.is_none() => self.entered_name(line.trim()),
            Typed::Nothing => {}
            Typed::Request(request) => self.enqueue(request),
            Typed::Mistake(text, word) => self.complain_of_error(text, &[&word, &word]),
        }
        Ok(())
    }

    /// A name, or nothing where Enter alone gives the one that is offered.
    fn entered_name(&mut self, line: &str) {
        match (line, self.stage, self.offer.take()) {
            ("", Stage::Asking, Some(offer)) => self.try_name(offer),
            ("", _, offer) => self.offer = offer,
            (_, Stage::Asking, _) => self.try_name(line.to_owned()),
            _ => self.name = Some(line.to_owned()),
        }
    }

    /// Puts a request behind those that wait to be sent, if it fits into a line.
    fn enqueue(&mut self, request: Request) {
        match request.wire().len().saturating_sub(MAX_REQUEST + 1) {
            0 => {
                let is_last = self.waiting.back() == Some(&Request::Quit);
                self.waiting.insert(self.waiting.len() - usize::from(is_last), request);
            }
            excess => self.complain_of_error(text::TOO_LONG, &[&excess.to_string()]),
        }
    }

    fn is_leaving(&self) -> bool {
        self.stage == Stage::Leaving || self.waiting.back() == Some(&Request::Quit)
    }

    /// Leaves once what was typed before is sent; asked a second time, at once.
    fn leave(&mut self) -> Result<(), End> {
        let is_unknown = matches!(self.stage, Stage::Connecting | Stage::Greeting);
        if self.is_leaving() {
            return Err(failed(text::LEFT_AT_ONCE, &[]));
        }
        if is_unknown && self.waiting.is_empty() {
            return Err(End::Left);
        }
        self.waiting.push_back(Request::Quit);
        Ok(())
    }

    // What is sent

    /// Sends what has been typed, as far as the stage allows.
    fn send_waiting(&mut self) {
        while self.stage == Stage::Talking && self.unconfirmed.len() < MAX_UNCONFIRMED {
            let Some(request) = self.waiting.pop_front() else { break };
            self.send(request);
        }
        if self.stage == Stage::Asking && self.is_leaving() {
            self.send(Request::Quit);
        }
    }

    /// Sends a request. Nobody takes it when the server is lost, which another thread reports.
    fn send(&mut self, request: Request) {
        if request == Request::Quit {
            let _ = self.out.send(request.wire());
            return self.enter(Stage::Leaving);
        }
        self.requests += 1;
        let _ = self.out.send(format!("{}PING {}\n", request.wire(), self.requests));
        self.unconfirmed.push_back(Sent { request, since: Instant::now() });
    }

    /// What was typed and did not, or perhaps not, reach the server, as sentences.
    fn unsent(&self, end: &End) -> Vec<String> {
        // BYE comes after everything that was sent before QUIT has been carried out.
        let unconfirmed = self.unconfirmed.iter().filter(|_| *end != End::Left);
        let unconfirmed = unconfirmed.filter_map(|sent| sent.request.text());
        let typed = self.screen.input.as_ref().map(|input| input.editor.line.clone());
        let waiting = self.waiting.iter().filter_map(Request::text);
        let waiting = waiting.chain(typed).filter(|text| !text.is_empty());
        let report = |text| move |line: String| say(text, &[&line]);
        let perhaps = unconfirmed.map(report(text::PERHAPS_NOT_SENT));
        perhaps.chain(waiting.map(report(text::NOT_SENT))).collect()
    }
}

fn failed(text: Text, words: &[&str]) -> End {
    End::Failed(say(text, words))
}

impl Roster {
    fn add(&mut self, name: &str) {
        if self.names.len() < MAX_ROSTER && name.len() <= MAX_NAME {
            self.names.insert(name.to_lowercase(), name.to_owned());
        }
    }

    fn has(&self, name: &str) -> bool {
        self.names.contains_key(&name.to_lowercase())
    }

    fn sorted(&self) -> Vec<&str> {
        let mut names: Vec<_> = self.names.values().map(String::as_str).collect();
        names.sort_by_cached_key(|name| plain_letters(name));
        names
    }
}

/// What a typed line means, in this room.
fn parse(line: &str, roster: &Roster) -> Typed {
    let say = |text: &str| Typed::Request(Request::Say(text.to_owned()));
    let start = line.trim_start();
    let (mark, rest) = match start.split_at_checked(1) {
        _ if start.is_empty() => return Typed::Nothing,
        Some(("/", text)) if text.starts_with('/') => return say(text),
        Some(("@", rest)) => ('@', rest),
        Some(("/", rest)) => ('/', rest),
        _ => return say(line),
    };
    let (word, text) = rest.split_once(' ').unwrap_or((rest, ""));
    let command = match word.to_lowercase().as_str() {
        _ if mark == '@' => None,
        "msg" => return parse(&format!("@{}", text.trim_start().trim_start_matches('@')), roster),
        "list" | "who" | "lista" | "clientes" | "usuarios" | "usuários" => {
            Some(Typed::Request(Request::List))
        }
        "help" | "ajuda" => Some(Typed::Help),
        "quit" | "exit" | "q" | "sair" => Some(Typed::Quit),
        // Commands of other chats, which nobody means for a person of that name.
        "me" | "nick" | "join" => return Typed::Mistake(text::FOREIGN_COMMAND, word.to_owned()),
        _ => None,
    };
    match (command, text.trim().is_empty()) {
        (Some(command), true) => command,
        (Some(_), false) => Typed::Mistake(text::TAKES_NOTHING, word.to_owned()),
        (None, true) if mark == '/' && !word.is_empty() && !roster.has(word) => {
            Typed::Mistake(text::NO_SUCH_COMMAND, word.to_owned())
        }
        (None, true) => Typed::Mistake(text::NOTHING_SAID, start.trim_end().to_owned()),
        (None, false) => {
            let (to, text) = (word.to_owned(), text.to_owned());
            Typed::Request(Request::Whisper { mark, to, text })
        }
    }
}

impl Request {
    /// The line to send, with its ending (PROTOCOL.md, "Requests").
    fn wire(&self) -> String {
        match self {
            Request::Say(text) => format!("MSG {text}\n"),
            Request::Whisper { to, text, .. } => format!("PRIV @{to} {text}\n"),
            Request::List | Request::Roster => "LIST\n".to_owned(),
            Request::Heartbeat => String::new(),
            Request::Quit => "QUIT\n".to_owned(),
        }
    }

    /// What was typed and would be missed if it were lost.
    fn text(&self) -> Option<String> {
        match self {
            Request::Say(text) => Some(text.clone()),
            Request::Whisper { mark, to, text } => Some(format!("{mark}{to} {text}")),
            Request::List | Request::Roster | Request::Heartbeat | Request::Quit => None,
        }
    }
}

/// Whether a character can stand in a name (PROTOCOL.md, "Requests").
fn is_part_of_name(character: char) -> bool {
    is_part_of_word(character) || matches!(character, '_' | '-' | '.')
}

/// Letters, digits, and the marks that are combined with them.
fn is_part_of_word(character: char) -> bool {
    character.is_alphanumeric() || width(character) == 0
}

/// Lower case and without accents, as names are looked for: `e` finds Érica, however it is encoded.
fn plain_letters(text: &str) -> String {
    let letters = text.chars().flat_map(char::to_lowercase).filter(|&c| width(c) > 0);
    let plain = letters.map(|letter| match letter {
        'à'..='å' => 'a',
        'ç' => 'c',
        'è'..='ë' => 'e',
        'ì'..='ï' => 'i',
        'ñ' => 'n',
        'ò'..='ö' => 'o',
        'ù'..='ü' => 'u',
        _ => letter,
    });
    plain.collect()
}

/// Whether a character could move the cursor, forge a line or turn the direction of the text
/// (PROTOCOL.md, "Text"). TAB may be sent and is drawn as spaces.
fn is_unprintable(character: char) -> bool {
    let turns = matches!(character, '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    turns || (character.is_control() && character != '\t')
}

/// Text from the network without anything that a terminal would obey.
fn printable(bytes: &[u8]) -> String {
    let mut shown = String::new();
    for character in String::from_utf8_lossy(bytes).chars() {
        match is_unprintable(character) {
            true => shown.extend(character.escape_default()),
            false => shown.push(character),
        }
    }
    shown
}

// The threads

/// Connects, and hands on what the server says until the connection ends.
fn talk_to_server(address: &str, lines: Receiver<String>, events: &SyncSender<Event>) {
    let sentence = match connect(address) {
        Err(reason) => say(text::CANNOT_CONNECT, &[address, &reason]),
        Ok(socket) => {
            let _ = events.send(Event::Connected);
            let writer = socket.clone();
            thread::spawn(move || write_to_server(&writer, &lines));
            say(text::LOST, &[address, &listen_to_server(&socket, events)])
        }
    };
    let _ = events.send(Event::Lost(sentence));
}

/// Connects to the first of the host's addresses that accepts. An error is the reason.
fn connect(address: &str) -> Result<Arc<TcpStream>, String> {
    let mut reason = say(text::NO_SUCH_HOST, &[]);
    for address in address.to_socket_addrs().map_err(|_| reason.clone())? {
        let socket = TcpStream::connect_timeout(&address, TIMEOUT);
        match socket.and_then(|socket| socket.set_nodelay(true).map(|()| socket)) {
            Ok(socket) => return Ok(Arc::new(socket)),
            Err(error) => reason = explain(&error),
        }
    }
    Err(reason)
}

/// Hands on the server's lines. Returns why there are no more.
fn listen_to_server(socket: &TcpStream, events: &SyncSender<Event>) -> String {
    let mut socket = BufReader::new(socket);
    loop {
        let mut line = Vec::new();
        match (&mut socket).take(MAX_LINE).read_until(b'\n', &mut line) {
            Err(error) => return explain(&error),
            Ok(_) if line.ends_with(b"\n") => {
                line.pop();
                let line = line.strip_suffix(b"\r").unwrap_or(&line);
                let _ = events.send(Event::Arrived(printable(line)));
            }
            Ok(length) if length as u64 == MAX_LINE => return say(text::LINE_TOO_LONG, &[]),
            Ok(_) => return say(text::CLOSED_CONNECTION, &[]),
        }
    }
}

fn write_to_server(mut socket: &TcpStream, lines: &Receiver<String>) {
    if lines.iter().any(|line| socket.write_all(line.as_bytes()).is_err()) {
        // Whoever reads from it learns why.
        let _ = socket.shutdown(Shutdown::Both);
    }
}

/// Hands on what is typed: from a terminal as it comes, otherwise line by line. The end is empty.
fn listen_to_person(
    mut input: impl BufRead,
    is_terminal: bool,
    typed: &SyncSender<Vec<u8>>,
    events: &SyncSender<Event>,
) {
    loop {
        let mut bytes = vec![0; 4096];
        let read = if is_terminal {
            input.read(&mut bytes).map(|length| bytes.truncate(length))
        } else {
            bytes.clear();
            input.read_until(b'\n', &mut bytes).map(drop)
        };
        match read {
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            // At a console of Windows, std takes Ctrl-Z for itself and returns what was before it.
            Ok(()) if bytes.is_empty() && is_terminal && cfg!(windows) => continue,
            Ok(()) => {}
            // A terminal that is gone gives an error.
            Err(_) => bytes.clear(),
        }
        let is_end = bytes.is_empty();
        if typed.send(bytes).is_err() || events.send(Event::Typed).is_err() || is_end {
            return;
        }
    }
}

// ---- The editor --------------------------------------------------------------------------------

/// The line being typed: keys in, a line of the screen out. It knows neither terminal nor socket.
#[derive(Default)]
struct Editor {
    line: String,
    /// A byte position in `line`.
    cursor: usize,
    history: Vec<String>,
    /// How far back in the history the arrow keys have gone.
    steps_back: usize,
    /// Lines that the arrow keys left, by their steps back, as they were left.
    drafts: HashMap<usize, String>,
    /// What was last erased by more than a character.
    killed: String,
    completion: Option<Completion>,
    /// Pasted lines, until the person says whether to send them.
    paste: Option<Vec<String>>,
}

/// A name that Tab has put in, so that another Tab puts in the next.
struct Completion {
    start: usize,
    stem: String,
    shown: usize,
}

impl Editor {
    /// Does what a key asks for. One that concerns others than the editor is returned.
    fn press(&mut self, key: Key) -> Option<Key> {
        if self.paste.is_some() && key != Key::Enter {
            if matches!(key, Key::Escape | Key::Interrupt) {
                self.paste = None;
            }
            return None;
        }
        if key != Key::Tab {
            self.completion = None;
        }
        match key {
            Key::Character(character) => self.insert(character.encode_utf8(&mut [0; 4])),
            Key::Paste(text) => self.take_paste(&text),
            Key::Yank => self.insert(&self.killed.clone()),
            Key::Transpose => self.transpose(),
            Key::Up => self.go_back(self.steps_back + 1),
            Key::Down => self.go_back(self.steps_back.saturating_sub(1)),
            Key::Interrupt | Key::EndOfInput if self.line.is_empty() => return Some(key),
            Key::Interrupt => self.killed = self.enter(),
            Key::EndOfInput => self.erase(Place::Right),
            Key::Move(to) => self.cursor = self.find(to),
            Key::Erase(to) => self.erase(to),
            _ => return Some(key),
        }
        None
    }

    /// Where a key goes from the cursor.
    fn find(&self, to: Place) -> usize {
        let (before, after) = self.line.split_at_checked(self.cursor).unwrap_or_default();
        let is_gap = |character| !is_part_of_word(character);
        match to {
            Place::Left => self.left_of(self.cursor),
            Place::Right => self.right_of(self.cursor),
            Place::Start => 0,
            Place::End => self.line.len(),
            Place::WordLeft => {
                before.trim_end_matches(is_gap).trim_end_matches(is_part_of_word).len()
            }
            Place::WordRight => {
                let rest = after.trim_start_matches(is_gap).trim_start_matches(is_part_of_word);
                self.line.len() - rest.len()
            }
            Place::SpaceLeft => {
                before.trim_end().trim_end_matches(|c: char| !c.is_whitespace()).len()
            }
        }
    }

    /// Puts text in at the cursor, without what a terminal would obey.
    fn insert(&mut self, text: &str) {
        let text = text.replace(is_unprintable, "");
        self.line.insert_str(self.cursor, &text);
        self.cursor += text.len();
    }

    fn cut(&mut self, from: usize, to: usize) -> String {
        self.cursor = from;
        self.line.drain(from..to).collect()
    }

    /// Erases from the cursor to a place. What is more than a character can be put in again.
    fn erase(&mut self, to: Place) {
        let at = self.find(to);
        let erased = self.cut(at.min(self.cursor), at.max(self.cursor));
        if !matches!(to, Place::Left | Place::Right) {
            self.killed = erased;
        }
    }

    /// One line is put in, to be edited; of several the person is asked.
    fn take_paste(&mut self, text: &str) {
        let lines = text.split(['\r', '\n']).filter(|line| !line.trim().is_empty());
        let lines: Vec<_> = lines.map(|line| line.replace(is_unprintable, "")).collect();
        match lines.as_slice() {
            [] => {}
            [line] => self.insert(line),
            _ => self.paste = Some(lines),
        }
    }

    /// Exchanges the characters around the cursor, or the last two.
    fn transpose(&mut self) {
        let is_at_end = self.cursor == self.line.len();
        let middle = if is_at_end { self.left_of(self.cursor) } else { self.cursor };
        let (left, right) = (self.left_of(middle), self.right_of(middle));
        if left < middle {
            let first = self.cut(left, middle);
            self.cursor = right - first.len();
            self.insert(&first);
        }
    }

    /// Begins a new line. Returns the one that was being typed.
    fn enter(&mut self) -> String {
        self.cursor = 0;
        self.steps_back = 0;
        self.drafts.clear();
        mem::take(&mut self.line)
    }

    fn remember(&mut self, line: &str) {
        if self.history.last().map(String::as_str) != Some(line) {
            self.history.push(line.to_owned());
        }
    }

    /// Shows the line that was entered so many lines ago; 0 is the one that is being typed.
    fn go_back(&mut self, steps: usize) {
        let Some(at) = self.history.len().checked_sub(steps) else { return };
        if steps == self.steps_back {
            return;
        }
        let line = self.drafts.remove(&steps).or_else(|| self.history.get(at).cloned());
        let left = mem::replace(&mut self.line, line.unwrap_or_default());
        self.drafts.insert(self.steps_back, left);
        self.steps_back = steps;
        self.cursor = self.line.len();
    }

    /// Completes the name at the cursor, wherever in the line; again, with the next of `names`.
    fn complete(&mut self, names: &[&str]) {
        if self.line.is_empty() && !names.is_empty() {
            self.insert("@");
        }
        let (before, rest) = self.line.split_at_checked(self.cursor).unwrap_or_default();
        let Completion { start, stem, shown } = self.completion.take().unwrap_or_else(|| {
            let word = before.rsplit(char::is_whitespace).next().unwrap_or_default();
            let stem = word.strip_prefix(['@', '/']).unwrap_or(word);
            Completion { start: before.len() - stem.len(), stem: plain_letters(stem), shown: 0 }
        });
        let mut fits = names.iter().filter(|name| plain_letters(name).starts_with(&stem)).cycle();
        let Some(name) = fits.nth(shown) else { return };
        // What stands behind the cursor may be the end of this very name.
        let (word, behind) = rest.split_at(rest.find(' ').unwrap_or(rest.len()));
        let is_its_end = plain_letters(name).strip_prefix(&stem) == Some(&plain_letters(word));
        let rest = if is_its_end { behind } else { rest };
        // Behind the first word the text begins; behind another there may be a comma.
        let (gap, rest) = if start <= 1 { (" ", rest.trim_start()) } else { ("", rest) };
        let completed = format!("{}{name}{gap}", self.line.get(..start).unwrap_or_default());
        (self.line, self.cursor) = (format!("{completed}{rest}"), completed.len());
        self.completion = Some(Completion { start, stem, shown: shown + 1 });
    }

    fn left_of(&self, at: usize) -> usize {
        (0..at).rev().find(|&at| self.is_between_characters(at)).unwrap_or(0)
    }

    fn right_of(&self, at: usize) -> usize {
        let end = self.line.len();
        (at + 1..=end).find(|&at| self.is_between_characters(at)).unwrap_or(end)
    }

    /// Whether the cursor may stand here: not within a character's bytes, nor before an accent or
    /// within an emoji or a flag that is made of several.
    fn is_between_characters(&self, at: usize) -> bool {
        let Some((before, after)) = self.line.split_at_checked(at) else { return false };
        let is_half = |c: char| HALVES_OF_FLAGS.contains(&c);
        let halves = before.chars().rev().take_while(|&c| is_half(c)).count();
        let is_within_flag = halves % 2 == 1 && after.starts_with(is_half);
        // ZERO WIDTH JOINER makes one emoji of those on both its sides.
        let is_joined = before.ends_with('\u{200d}');
        let joins = |c| width(c) == 0 || SKIN_TONES.contains(&c);
        !is_joined && !is_within_flag && !after.starts_with(joins)
    }

    /// What to show in so many columns: the parts before and after the cursor. A longer line is
    /// shown in part, moved by half a window at a time so that one sees what is around the cursor.
    fn view(&self, columns: usize) -> (String, String) {
        // A TAB would be as wide as the terminal likes.
        let line = self.line.replace('\t', " ");
        let (before, after) = line.split_at_checked(self.cursor).unwrap_or_default();
        let half = columns.div_ceil(2).max(1);
        let skipped = width_of(before).saturating_sub(columns).div_ceil(half) * half;
        let mut column = 0;
        let before: String =
            before.chars().skip_while(|&c| (column < skipped, column += width(c)).0).collect();
        let mut column = width_of(&before);
        let after = after.chars().take_while(|&c| (column += width(c), column <= columns).1);
        (before, after.collect())
    }
}

// ---- The screen --------------------------------------------------------------------------------

/// How something that is shown stands apart, as ECMA-48 numbers it (SGR).
const PLAIN: &str = "";
const STANDS_OUT: &str = "1";
const NOTICE: &str = "2";
const ERROR: &str = "38;5;196";
/// Colours of names. They are of the 256 colours' cube, which is the same on every terminal (xterm's
/// control sequences, "SGR"), and have a contrast of more than 3.6 with black and with white, as WCAG
/// 2 computes it: (lighter + 0.05) / (darker + 0.05) of relative luminances.
const NAMES: [u8; 10] = [26, 28, 30, 32, 63, 64, 100, 130, 161, 164];
/// Spaces before every row of a line but the first.
const INDENT: usize = 4;
/// Times are shown in a window of so many columns.
const ROOM_FOR_TIMES: usize = 60;
/// Columns of the line being typed that a prompt leaves free.
const ROOM_TO_TYPE: usize = 8;
/// To the start of the row, and nothing from there on (ECMA-48: CR, ED).
const ERASE: &str = "\r\x1b[J";
/// To the first row and column, and nothing from there on (CUP, ED).
const CLEAR: &str = "\x1b[H\x1b[J";

/// Where the conversation is shown.
#[derive(Default)]
struct Screen {
    /// At a terminal, the line being typed, which stays below everything else.
    input: Option<Input>,
    has_colours: bool,
    shows_time: bool,
    /// To be shown with the next `flush`.
    pending: String,
}

#[derive(Default)]
struct Input {
    editor: Editor,
    keys: Keys,
    columns: usize,
}

impl Screen {
    /// Shows a line, in as many rows as it takes. Only the first begins at the left edge, so that
    /// what stands there is never somebody else's text.
    fn show(&mut self, style: &str, line: &str) {
        let line = self.painted(style, line);
        match &self.input {
            Some(input) => line.lines().for_each(|line| self.pending += &wrap(line, input.columns)),
            None => self.pending += &(line + "\n"),
        }
    }

    /// Shows what somebody said or did, with the time if there is room for it.
    fn show_event(&mut self, style: &str, line: &str) {
        let mut line = self.painted(style, line);
        if self.has_times() {
            line = format!("{} {line}", self.painted(NOTICE, &terminal::local_time()));
        }
        self.show(PLAIN, &line);
    }

    fn has_times(&self) -> bool {
        self.shows_time && self.input.as_ref().is_some_and(|it| it.columns >= ROOM_FOR_TIMES)
    }

    /// Columns for an event in one row. A pipe has no end of them.
    fn room(&self) -> usize {
        let columns = self.input.as_ref().map_or(usize::MAX, |input| input.columns);
        columns - "00:00 ".len() * usize::from(self.has_times())
    }

    fn painted(&self, style: &str, text: &str) -> String {
        match self.has_colours && style != PLAIN {
            true => format!("\x1b[{style}m{text}\x1b[0m"),
            false => text.to_owned(),
        }
    }

    /// A name in a colour of its own, the same wherever it appears.
    fn name(&self, name: &str) -> String {
        let mix = |sum: usize, byte: u8| sum.wrapping_mul(31).wrapping_add(byte.into());
        let colour = NAMES.get(name.to_lowercase().bytes().fold(0, mix) % NAMES.len());
        self.painted(&format!("38;5;{}", colour.copied().unwrap_or_default()), name)
    }

    /// Shows what is pending, and the line being typed behind its prompt, with one write.
    fn flush(&mut self, prompt: &str) -> io::Result<()> {
        let mut shown = mem::take(&mut self.pending);
        if let Some(input) = &self.input {
            shown = format!("{ERASE}{shown}{}", input.draw(prompt));
        }
        let mut out = io::stdout().lock();
        out.write_all(shown.as_bytes())?;
        out.flush()
    }
}

impl Input {
    /// The prompt and the line. What stands before the cursor is printed, the cursor saved, the
    /// rest printed, and the cursor restored (`ESC 7`, `ESC 8`): so it is right even where the
    /// terminal gives a character another width than `width` does. Nothing wraps meanwhile. A
    /// prompt that leaves no room to type is shown only until something is typed.
    fn draw(&self, prompt: &str) -> String {
        let is_wide = width_of(prompt) + ROOM_TO_TYPE > self.columns;
        let is_typing = self.editor.paste.is_none() && !self.editor.line.is_empty();
        let prompt = if is_wide && is_typing { "" } else { prompt };
        let (before, after) = match self.editor.paste {
            None => self.editor.view(self.columns.saturating_sub(width_of(prompt) + 1)),
            Some(_) => Default::default(),
        };
        format!("\x1b[?7l{prompt}{before}\x1b7{after}\x1b8\x1b[?7h")
    }
}

/// Rows of so many columns, broken at spaces where there are some.
fn wrap(line: &str, columns: usize) -> String {
    let indent = INDENT.min(columns / 4);
    let edge = format!("\n{:indent$}", "");
    let (mut rows, mut column) = (String::new(), 0);
    // The last space, where the row could be broken, and the column behind it.
    let mut space = None;
    let mut is_styling = false;
    for character in line.chars() {
        is_styling |= character == '\x1b';
        let width = match character {
            _ if is_styling => 0,
            '\t' => 8 - column % 8,
            _ => width(character),
        };
        if column + width > columns {
            if character.is_whitespace() {
                // What follows begins a row.
                (column, space) = (columns, None);
                continue;
            }
            let (at, word) = match space.take() {
                Some((at, start)) if indent + column - start + width <= columns => {
                    (at..at + 1, column - start)
                }
                _ => (rows.len()..rows.len(), 0),
            };
            rows.replace_range(at, &edge);
            column = indent + word;
        }
        column += width;
        match character {
            '\t' => rows.extend(std::iter::repeat_n(' ', width)),
            _ => rows.push(character),
        }
        if character == ' ' {
            space = Some((rows.len() - 1, column));
        }
        is_styling &= character != 'm';
    }
    rows + "\n"
}

// ---- The keys ----------------------------------------------------------------------------------

#[derive(Clone, Debug, PartialEq, Eq)]
enum Key {
    Character(char),
    /// Pasted text, if the terminal tells where it begins and ends.
    Paste(String),
    Enter,
    Tab,
    Escape,
    Up,
    Down,
    Move(Place),
    Erase(Place),
    Yank,
    Transpose,
    ClearScreen,
    Suspend,
    /// Ctrl-C.
    Interrupt,
    /// Ctrl-D.
    EndOfInput,
    NotUtf8,
    Unknown,
}

/// Where a key moves the cursor, or up to where it erases.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Left,
    Right,
    WordLeft,
    WordRight,
    /// The start of what has no space in it.
    SpaceLeft,
    Start,
    End,
}

/// Finds the keys in what a terminal sends, however it is cut into pieces.
#[derive(Default)]
struct Keys {
    pending: Vec<u8>,
    /// How many of these bytes do not hold the end of a paste.
    searched: usize,
    /// When something was last added.
    since: Option<Instant>,
}

/// What the terminal puts around pasted text.
const PASTE_BEGINS: &[u8] = b"\x1b[200~";
const PASTE_ENDS: &[u8] = b"\x1b[201~";
/// The longest escape sequence that is waited for.
const MAX_SEQUENCE: usize = 16;

impl Keys {
    fn add(&mut self, bytes: &[u8]) {
        self.pending.extend(bytes);
        self.since = Some(Instant::now());
    }

    /// The next whole key.
    fn next(&mut self) -> Option<Key> {
        let (key, length) = match self.pending.starts_with(PASTE_BEGINS) {
            true => self.paste()?,
            false => Self::first(&self.pending)?,
        };
        self.pending.drain(..length);
        self.searched = 0;
        Some(key)
    }

    /// A whole paste. Each of its bytes is looked at once, however many pieces it comes in.
    fn paste(&mut self) -> Option<(Key, usize)> {
        let start = PASTE_BEGINS.len();
        let from = self.searched.max(start);
        let mut places = self.pending.get(from..)?.windows(PASTE_ENDS.len());
        let Some(end) = places.position(|bytes| bytes == PASTE_ENDS).map(|at| from + at) else {
            self.searched = self.pending.len().saturating_sub(PASTE_ENDS.len());
            return None;
        };
        let text = String::from_utf8_lossy(self.pending.get(start..end)?).into_owned();
        Some((Key::Paste(text), end + PASTE_ENDS.len()))
    }

    /// Until when more may come of what could be the key Esc.
    fn deadline(&self) -> Option<Instant> {
        self.since.filter(|_| self.pending == b"\x1b").map(|since| since + ESCAPE_TIMEOUT)
    }

    /// The key Esc, if nothing has come behind it.
    fn time_out(&mut self, now: Instant) -> Option<Key> {
        self.deadline().filter(|&deadline| deadline <= now)?;
        self.pending.clear();
        Some(Key::Escape)
    }

    /// The first key in `bytes` and how many bytes it takes, if it is all there.
    fn first(bytes: &[u8]) -> Option<(Key, usize)> {
        let key = match bytes.first()? {
            0x1b => return Self::escape_sequence(bytes),
            b'\r' | b'\n' => Key::Enter,
            b'\t' => Key::Tab,
            0x08 | 0x7f => Key::Erase(Place::Left),
            0x01 => Key::Move(Place::Start),
            0x02 => Key::Move(Place::Left),
            0x03 => Key::Interrupt,
            0x04 => Key::EndOfInput,
            0x05 => Key::Move(Place::End),
            0x06 => Key::Move(Place::Right),
            0x0b => Key::Erase(Place::End),
            0x0c => Key::ClearScreen,
            0x0e => Key::Down,
            0x10 => Key::Up,
            0x14 => Key::Transpose,
            0x15 => Key::Erase(Place::Start),
            0x17 => Key::Erase(Place::SpaceLeft),
            0x19 => Key::Yank,
            0x1a => Key::Suspend,
            0x00..=0x1f => Key::Unknown,
            0x20..=0x7e => Key::Character(char::from(*bytes.first()?)),
            0x80.. => return Self::wide_character(bytes),
        };
        Some((key, 1))
    }

    /// A character of more than one byte.
    fn wide_character(bytes: &[u8]) -> Option<(Key, usize)> {
        let start = bytes.get(..4).unwrap_or(bytes);
        let chunk = start.utf8_chunks().next()?;
        if let Some(character) = chunk.valid().chars().next() {
            return Some((Key::Character(character), character.len_utf8()));
        }
        // Cut off, so there may be more of it to come; or not UTF-8 at all.
        let is_cut = std::str::from_utf8(start).is_err_and(|error| error.error_len().is_none());
        (!is_cut).then_some((Key::NotUtf8, chunk.invalid().len()))
    }

    /// ESC and what belongs to it: `ESC [ … final`, `ESC O final`, or one more key (ECMA-48; what
    /// the keys send is in the "Special Keys" part of xterm's control sequences, in rxvt(7), and in
    /// "The Keyboard panel" of PuTTY's manual).
    fn escape_sequence(bytes: &[u8]) -> Option<(Key, usize)> {
        let kind = *bytes.get(1)?;
        let rest = bytes.get(2..)?;
        match kind {
            b'[' | b'O' => {}
            // ESC before another sequence stands for itself.
            0x1b => return Some((Key::Escape, 1)),
            b'b' => return Some((Key::Move(Place::WordLeft), 2)),
            b'f' => return Some((Key::Move(Place::WordRight), 2)),
            b'd' => return Some((Key::Erase(Place::WordRight), 2)),
            0x08 | 0x7f => return Some((Key::Erase(Place::WordLeft), 2)),
            _ => return Self::first(bytes.get(1..)?).map(|(_, length)| (Key::Unknown, 1 + length)),
        }
        // The console's F1 is `ESC [ [ A`, and End of PuTTY that plays rxvt `ESC [ O w`; what Shift
        // adds in rxvt ends with `$`.
        let begun = usize::from(kind == b'[' && matches!(rest.first(), Some(b'[' | b'O')));
        let is_final = |byte: &u8| matches!(byte, b'$' | 0x40..=0x7e);
        let Some(end) = rest.iter().skip(begun).position(is_final) else {
            return (rest.len() > MAX_SEQUENCE).then_some((Key::Unknown, bytes.len()));
        };
        let key = match rest.get(..=begun + end)? {
            b"A" => Key::Up,
            b"B" => Key::Down,
            b"C" => Key::Move(Place::Right),
            b"D" => Key::Move(Place::Left),
            // Ctrl, Alt; rxvt's Ctrl.
            b"1;5C" | b"1;3C" | b"5C" | b"c" => Key::Move(Place::WordRight),
            b"1;5D" | b"1;3D" | b"5D" | b"d" => Key::Move(Place::WordLeft),
            b"H" | b"1~" | b"7~" => Key::Move(Place::Start),
            b"F" | b"4~" | b"8~" | b"Ow" => Key::Move(Place::End),
            b"3~" => Key::Erase(Place::Right),
            _ => Key::Unknown,
        };
        Some((key, 2 + begun + end + 1))
    }
}

// ---- The command line --------------------------------------------------------------------------

#[derive(Debug, PartialEq, Eq)]
struct Options {
    /// HOST:PORT.
    address: String,
    name: Option<String>,
    language: Language,
    has_colours: bool,
    shows_time: bool,
    rings: bool,
}

impl Options {
    fn new(language: Language) -> Options {
        let (address, name) = (String::new(), None);
        Options { address, name, language, has_colours: true, shows_time: true, rings: false }
    }

    /// Reads the command line, which may ask for nothing but a text. An error is what to say on
    /// standard error, and about which word.
    fn parse(&mut self, arguments: Vec<String>) -> Result<Option<Text>, (Text, String)> {
        let (mut arguments, mut words) = (arguments.into_iter(), Vec::new());
        while let Some(mut argument) = arguments.next() {
            if argument == "--lang" {
                argument = format!("--lang={}", arguments.next().unwrap_or_default());
            }
            if argument.contains(is_unprintable) {
                return Err((text::CONTROL_IN_ARGUMENT, printable(argument.as_bytes())));
            }
            match argument.as_str() {
                "--bell" => self.rings = true,
                "--no-color" => self.has_colours = false,
                "--no-time" => self.shows_time = false,
                "--help" | "-h" => return Ok(Some(text::USAGE)),
                "--version" | "-V" => return Ok(Some(text::VERSION)),
                "--lang=en" => self.language = Language::English,
                "--lang=pt" => self.language = Language::Portuguese,
                _ if argument.starts_with("--lang=") => {
                    return Err((text::NO_SUCH_LANGUAGE, argument.replace("--lang=", "")));
                }
                _ if argument.starts_with('-') => return Err((text::NO_SUCH_OPTION, argument)),
                _ => words.push(argument),
            }
        }
        let mut words = words.into_iter().peekable();
        let (host, port) = split_address(&words.next().unwrap_or(DEFAULT_HOST.to_owned()));
        // A second word of digits is the port, as telnet and nc have it.
        let is_port = |word: &String| port.is_none() && word.bytes().all(|b| b.is_ascii_digit());
        let port = words.next_if(is_port).or(port).unwrap_or(DEFAULT_PORT.to_string());
        self.address = match port.parse() {
            Ok(1u16..) => format!("{host}:{port}"),
            _ => return Err((text::BAD_PORT, port)),
        };
        self.name = words.next();
        words.next().map_or(Ok(None), |word| Err((text::TOO_MANY_WORDS, word)))
    }
}

/// The host and the port of `HOST`, `HOST:PORT`, `[IPV6]:PORT` or a bare IPv6 address.
fn split_address(address: &str) -> (String, Option<String>) {
    let is_bare_ipv6 = address.matches(':').count() > 1 && !address.starts_with('[');
    match address.rsplit_once(':') {
        _ if is_bare_ipv6 => (format!("[{address}]"), None),
        Some((host, port)) if !port.ends_with(']') => (host.to_owned(), Some(port.to_owned())),
        _ => (address.to_owned(), None),
    }
}

/// Connects and talks. Returns what there is to complain of.
fn chat(options: Options) -> Vec<String> {
    let (events, happened) = mpsc::sync_channel(EVENTS_AHEAD);
    let (keyboard, typed) = mpsc::sync_channel(1);
    let (out, lines) = mpsc::channel();
    let is_at_terminal = io::stdin().is_terminal() && io::stdout().is_terminal();
    // What understands no control sequences says so. Windows has no such variable.
    let is_dumb = variable("TERM").map_or(cfg!(unix), |kind| kind == "dumb");
    let is_raw = is_at_terminal && !is_dumb && terminal::take_over(events.clone()).is_ok();
    let report = panic::take_hook();
    panic::set_hook(Box::new(move |panic| {
        terminal::give_back();
        report(panic);
    }));
    let has_colours = is_raw && options.has_colours && variable("NO_COLOR").is_none();
    let input = is_raw.then(|| Input { columns: terminal::columns(), ..Input::default() });
    let (shows_time, pending) = (options.shows_time, String::new());
    let screen = Screen { input, has_colours, shows_time, pending };

    let (address, arrived) = (options.address.clone(), events.clone());
    thread::spawn(move || talk_to_server(&address, lines, &arrived));
    thread::spawn(move || listen_to_person(io::stdin().lock(), is_raw, &keyboard, &events));
    let mut client = Client::new(options, screen, out);
    if is_raw {
        client.offer = login_name(variable);
        if !is_utf8(&locale("LC_CTYPE", variable)) {
            client.warn_of_terminal();
        }
    }
    let end = client.run(&happened, &typed);
    terminal::give_back();
    let unsent = client.unsent(&end);
    let is_troubled = client.is_troubled && !is_at_terminal;
    let reason = match end {
        End::Failed(reason) => Some(reason),
        End::Left => is_troubled.then(|| say(text::SOME_NOT_TAKEN, &[])),
    };
    reason.into_iter().chain(unsent).collect()
}

fn variable(name: &str) -> Option<String> {
    env::var(name).ok().filter(|value| !value.is_empty())
}

/// Who is logged in, if that can be a name in the room.
fn login_name(variable: impl Fn(&str) -> Option<String>) -> Option<String> {
    let name = ["LOGNAME", "USER", "USERNAME"].into_iter().find_map(variable)?;
    let begins_well = name.starts_with(char::is_alphanumeric);
    (begins_well && name.len() <= MAX_NAME && name.chars().all(is_part_of_name)).then_some(name)
}

/// What the locale says of something, by the first of its variables that is set (locale(7)); one
/// that is empty is not.
fn locale(category: &str, variable: impl Fn(&str) -> Option<String>) -> String {
    ["LC_ALL", category, "LANG"].into_iter().find_map(variable).unwrap_or_default()
}

/// Whether text is UTF-8 in this locale. The one of POSIX does not tell what a terminal sends.
fn is_utf8(locale: &str) -> bool {
    let locale = locale.to_lowercase();
    let is_unknown = matches!(locale.as_str(), "" | "c" | "posix") || cfg!(windows);
    is_unknown || locale.contains("utf-8") || locale.contains("utf8")
}

fn main() -> ExitCode {
    let is_portuguese = locale("LC_MESSAGES", variable).starts_with("pt");
    let language = if is_portuguese { Language::Portuguese } else { Language::English };
    let mut options = Options::new(language);
    let arguments = env::args_os().skip(1).map(|word| word.to_string_lossy().into_owned());
    let command = options.parse(arguments.collect());
    let _ = LANGUAGE.set(options.language);
    let (status, complaints) = match command {
        Ok(None) => (1, chat(options)),
        Ok(Some(text)) => {
            let text = say(text, &[env!("CARGO_PKG_VERSION")]);
            let error = io::stdout().write_all(text.as_bytes()).err();
            let complaint = error.map(|error| say(text::NO_OUTPUT, &[&explain(&error)]));
            (1, complaint.into_iter().collect())
        }
        Err((text, word)) => (2, vec![say(text, &[&word])]),
    };
    for complaint in &complaints {
        let _ = writeln!(io::stderr(), "linechat-client: {complaint}");
    }
    ExitCode::from(if complaints.is_empty() { 0 } else { status })
}

// ---- The terminal: the little that std lacks, and the only `unsafe` ----------------------------

/// On Unix, what a terminal's settings look like in memory differs from system to system; stty(1)
/// knows, and its operands are POSIX's.
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
        fn raise(number: c_int) -> c_int;
        fn write(fd: c_int, bytes: *const u8, count: usize) -> isize;
        fn time(now: *mut i64) -> i64;
        /// `struct tm` begins with the second, the minute and the hour (<time.h>).
        fn localtime(time: *const i64) -> *const [c_int; 3];
    }

    /// The settings to give the terminal back with.
    static SETTINGS: OnceLock<String> = OnceLock::new();

    /// Takes the terminal over until `give_back`, which also happens when a signal ends the process.
    /// An event is sent when the line being typed is to be drawn again.
    pub fn take_over(events: SyncSender<Event>) -> io::Result<()> {
        let _ = SETTINGS.set(stty(&["-g"])?);
        watch_signals(events)?;
        enter_raw_mode().inspect_err(|_| give_back())
    }

    fn enter_raw_mode() -> io::Result<()> {
        // Keys as they are pressed and not line by line (-icanon), shown by us alone (-echo);
        // Ctrl-C and Ctrl-Z (-isig), Ctrl-V and Ctrl-O (-iexten), Ctrl-S and Ctrl-Q (-ixon) as keys
        // like others; at least one byte, whenever it comes.
        stty(&["-icanon", "-echo", "-isig", "-iexten", "-ixon", "min", "1", "time", "0"])?;
        // Pasted text comes between marks (xterm's control sequences, "Bracketed Paste Mode").
        io::stdout().write_all(b"\x1b[?2004h")
    }

    /// Gives the terminal back as it was, without the line being typed.
    pub fn give_back() {
        if let Some(settings) = SETTINGS.get() {
            let _ = stty(&[settings]);
            let mut out = io::stdout();
            let _ = out.write_all(b"\r\x1b[J\x1b[?7h\x1b[?2004l").and_then(|()| out.flush());
        }
    }

    /// Stops this program and those that it was started with, as Ctrl-Z does elsewhere, until the
    /// shell goes on with them. Where no shell could, nothing happens.
    pub fn suspend() {
        give_back();
        // SAFETY: these take no pointer but the handler's, which does what signal-safety(7) allows.
        unsafe {
            signal(SIGTSTP, SIG_IGN);
            kill(0, SIGTSTP);
            signal(SIGTSTP, SIG_DFL);
            raise(SIGTSTP);
            signal(SIGTSTP, on_signal as *const () as usize);
        }
        let _ = enter_raw_mode();
    }

    /// How many columns the window has.
    pub fn columns() -> usize {
        columns_of(&stty(&["size"]).unwrap_or_default())
    }

    /// The columns of `ROWS COLUMNS`. A terminal that nobody told its size says 0.
    pub fn columns_of(size: &str) -> usize {
        let columns = size.split_whitespace().nth(1).and_then(|columns| columns.parse().ok());
        columns.filter(|&columns| columns > 0).unwrap_or(80)
    }

    /// HH:MM here and now.
    pub fn local_time() -> String {
        let mut now = 0;
        // SAFETY: each is given the `time_t` that the other fills or reads, which is no longer than
        // `now`. What comes back is nothing, or is left alone until the next call, which is here.
        let time = unsafe {
            time(&mut now);
            localtime(&now).as_ref()
        };
        let [_, minute, hour] = time.copied().unwrap_or_default();
        format!("{hour:02}:{minute:02}")
    }

    /// The text of a piped line, if it is UTF-8.
    pub fn decode(bytes: &[u8]) -> Option<String> {
        String::from_utf8(bytes.to_vec()).ok()
    }

    /// Asks stty(1), or has it change settings. Returns what it prints.
    fn stty(operands: &[&str]) -> io::Result<String> {
        let mut command = Command::new("stty");
        let command = command.args(operands).stdin(Stdio::inherit()).stderr(Stdio::null());
        let output = command.output()?;
        match output.status.success() {
            true => Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned()),
            false => Err(io::Error::other("stty failed")),
        }
    }

    /// SIGHUP, SIGINT, SIGQUIT and SIGTERM end the program. The numbers of signals are the same on
    /// Linux (but for MIPS), macOS and the BSDs, two of them exchanged (signal(7)).
    const ENDING: [c_int; 4] = [1, 2, 3, 15];
    const SIGTSTP: c_int = if cfg!(target_os = "linux") { 20 } else { 18 };
    const SIGCONT: c_int = if cfg!(target_os = "linux") { 18 } else { 19 };
    const SIGWINCH: c_int = 28;
    const SIG_DFL: usize = 0;
    const SIG_IGN: usize = 1;

    /// Where the signal handler writes the number of the signal.
    static SIGNALS: AtomicI32 = AtomicI32::new(-1);

    fn watch_signals(events: SyncSender<Event>) -> io::Result<()> {
        let (reader, writer) = UnixStream::pair()?;
        SIGNALS.store(writer.into_raw_fd(), Ordering::SeqCst);
        for number in ENDING.into_iter().chain([SIGTSTP, SIGCONT, SIGWINCH]) {
            // SAFETY: the handler only does what signal-safety(7) allows.
            unsafe { signal(number, on_signal as *const () as usize) };
        }
        thread::spawn(move || {
            for number in BufReader::new(reader).bytes().map_while(Result::ok) {
                match c_int::from(number) {
                    SIGTSTP => suspend(),
                    // Whoever had the terminal meanwhile has changed its settings.
                    SIGCONT => drop(enter_raw_mode()),
                    SIGWINCH => {}
                    number => {
                        give_back();
                        // What a shell reports of a program that a signal has ended.
                        process::exit(128 + number);
                    }
                }
                let _ = events.send(Event::Redraw);
            }
        });
        Ok(())
    }

    extern "C" fn on_signal(number: c_int) {
        let byte = number as u8;
        // SAFETY: the descriptor stays open for ever; one byte is there to be written. A second
        // signal of those that end the process does so even if the terminal cannot be given back.
        unsafe {
            if ENDING.contains(&number) {
                signal(number, SIG_DFL);
            }
            write(SIGNALS.load(Ordering::SeqCst), &byte, 1);
        }
    }
}

/// On Windows, a console understands the same control sequences once it is asked to, and sends them
/// for its keys (SetConsoleMode, GetConsoleScreenBufferInfo; <consoleapi.h>, <wincon.h>).
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
        fn GetConsoleOutputCP() -> u32;
        fn GetLocalTime(time: *mut [u16; 8]);
        /// From a code page, with flags; so many bytes, to so many units.
        fn MultiByteToWideChar(_: u32, _: u32, _: *const u8, _: i32, _: *mut u16, _: i32) -> i32;
    }

    /// ENABLE_PROCESSED_INPUT (Ctrl-C is no key), ENABLE_LINE_INPUT and ENABLE_ECHO_INPUT.
    const COOKED: u32 = 0x1 | 0x2 | 0x4;
    /// ENABLE_VIRTUAL_TERMINAL_INPUT: keys come as control sequences.
    const SENDS_SEQUENCES: u32 = 0x200;
    /// ENABLE_PROCESSED_OUTPUT and ENABLE_VIRTUAL_TERMINAL_PROCESSING.
    const OBEYS_SEQUENCES: u32 = 0x1 | 0x4;
    const MB_ERR_INVALID_CHARS: u32 = 0x8;

    /// The modes of input and output to give the console back with.
    static MODES: OnceLock<(u32, u32)> = OnceLock::new();

    /// Takes the console over until `give_back`. An event is sent when the window has another size.
    pub fn take_over(events: SyncSender<Event>) -> io::Result<()> {
        let (input, output) = (io::stdin().as_raw_handle(), io::stdout().as_raw_handle());
        let keys = change_mode(input, |mode| mode & !COOKED | SENDS_SEQUENCES)?;
        let screen = change_mode(output, |mode| mode | OBEYS_SEQUENCES)
            .inspect_err(|_| drop(change_mode(input, |_| keys)))?;
        let _ = MODES.set((keys, screen));
        thread::spawn(move || {
            let mut last = columns();
            // No signal tells that the window has another width.
            loop {
                thread::sleep(Duration::from_millis(250));
                if mem::replace(&mut last, columns()) != last {
                    let _ = events.send(Event::Redraw);
                }
            }
        });
        Ok(())
    }

    /// Gives the console back as it was, without the line being typed.
    pub fn give_back() {
        if let Some((keys, screen)) = MODES.get() {
            let mut out = io::stdout();
            let _ = out.write_all(b"\r\x1b[J\x1b[?7h").and_then(|()| out.flush());
            let _ = change_mode(io::stdin().as_raw_handle(), |_| *keys);
            let _ = change_mode(out.as_raw_handle(), |_| *screen);
        }
    }

    /// Windows knows no such thing.
    pub fn suspend() {}

    /// How many columns the window has.
    pub fn columns() -> usize {
        let output = io::stdout().as_raw_handle();
        // `CONSOLE_SCREEN_BUFFER_INFO` has, from the sixth number on, the window's left, top, right.
        let mut info = [0; 11];
        // SAFETY: `info` has the size of what the call fills, and outlives it.
        let is_known = unsafe { GetConsoleScreenBufferInfo(output, &mut info) } != 0;
        let [_, _, _, _, _, left, _, right, ..] = info;
        let columns = usize::try_from(i32::from(right) - i32::from(left) + 1).ok();
        columns.filter(|&columns| is_known && columns > 0).unwrap_or(80)
    }

    /// HH:MM here and now.
    pub fn local_time() -> String {
        // `SYSTEMTIME`: year, month, day of the week, day, hour, minute, …
        let mut time = [0; 8];
        // SAFETY: `time` has the size of what the call fills, and outlives it.
        unsafe { GetLocalTime(&mut time) };
        let [.., hour, minute, _, _] = time;
        format!("{hour:02}:{minute:02}")
    }

    /// The text of a piped line: UTF-8, or the console's encoding, which is what cmd.exe writes.
    pub fn decode(bytes: &[u8]) -> Option<String> {
        if let Ok(text) = String::from_utf8(bytes.to_vec()) {
            return Some(text);
        }
        let length = i32::try_from(bytes.len()).ok()?;
        // No encoding has a byte that stands for more than one unit of UTF-16.
        let mut wide = vec![0; bytes.len()];
        let (from, to) = (bytes.as_ptr(), wide.as_mut_ptr());
        // SAFETY: both pointers are good for `length` units, and nothing is kept.
        let units = unsafe {
            let code_page = GetConsoleOutputCP();
            MultiByteToWideChar(code_page, MB_ERR_INVALID_CHARS, from, length, to, length)
        };
        let units = usize::try_from(units).ok().filter(|&units| units > 0)?;
        String::from_utf16(wide.get(..units)?).ok()
    }

    /// Changes a console's mode. Returns the one that it had.
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

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Language {
    English,
    Portuguese,
}

/// What everything is said in. It is set once, before anything is said.
static LANGUAGE: OnceLock<Language> = OnceLock::new();

/// Something that the client says, in English and in Portuguese. Each `{}` is filled in, in order.
type Text = [&'static str; 2];

fn say(text: Text, words: &[&str]) -> String {
    let [english, portuguese] = text;
    let is_portuguese = LANGUAGE.get() == Some(&Language::Portuguese);
    let pieces = if is_portuguese { portuguese } else { english }.split("{}");
    // A word stands before every piece but the first.
    [""].iter().chain(words).zip(pieces).flat_map(|(word, piece)| [*word, piece]).collect()
}

/// What an ERR of the server means (PROTOCOL.md, "Errors"), or else the server's own text, quoted as
/// words in another language.
fn explain_code(code: &str, text: &str) -> String {
    let ours = match code {
        "bad-name" => text::BAD_NAME,
        "name-taken" => text::NAME_TAKEN,
        "no-such-user" => text::NOBODY,
        "bad-text" => text::CONTROL_CHARACTERS,
        "line-too-long" => text::LINE_REFUSED,
        "full" => text::FULL,
        "timeout" => text::NO_NAME_IN_TIME,
        "usage" | "unknown-command" | "not-named" | "already-named" => text::NOT_UNDERSTOOD,
        _ => return format!("\"{}\"", if text.is_empty() { code } else { text }),
    };
    say(ours, &[])
}

/// Why the operating system let something fail, in our words as far as there are some.
fn explain(error: &io::Error) -> String {
    let ours = match error.kind() {
        ErrorKind::ConnectionRefused => text::REFUSED,
        ErrorKind::TimedOut => text::NO_ANSWER,
        ErrorKind::ConnectionReset | ErrorKind::ConnectionAborted => text::CLOSED_CONNECTION,
        _ => return format!("\"{error}\""),
    };
    say(ours, &[])
}

/// Everything that the client says.
mod text {
    macro_rules! texts {
        ($($name:ident $english:literal $portuguese:literal)*) => {
            $(pub const $name: super::Text = [$english, $portuguese];)*
        };
    }
    texts! {
    YOUR_NAME "Your name:" "Seu nome:"
    YOUR_NAME_OR "Your name [{}]: " "Seu nome [{}]: "
    CONNECTING "connecting to {} … " "conectando a {} … "
    LEAVING "leaving … " "saindo … "
    UNCONFIRMED "({} unconfirmed) > " "({} sem confirmação) > "
    NO_ANSWER_YET "(no answer yet) > " "(ainda sem resposta) > "
    PASTE "Paste {} lines? Enter: yes, Esc: no " "Colar {} linhas? Enter: sim, Esc: não "
    WELCOME "Welcome, {}! /help lists the commands; @name text speaks to one person."
        "Olá, {}! /ajuda mostra os comandos; @nome texto fala só com uma pessoa."
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
    FOREIGN_COMMAND "there is no command /{}; to write to somebody of that name: @{} text"
        "não existe o comando /{}; para escrever para alguém com esse nome: @{} texto"
    TAKES_NOTHING "/{} stands alone; to write to somebody of that name: @{} text"
        "/{} não leva texto; para escrever para alguém com esse nome: @{} texto"
    NOTHING_SAID "a text is missing behind '{}'; see /help" "falta o texto depois de '{}'; veja /ajuda"
    NAME_REFUSED "the name '{}' was refused: {}" "o nome '{}' foi recusado: {}"
    BAD_NAME "a name has 1 to 50 bytes: letters, digits, _ - . and no spaces; the first is a \
        letter or digit"
        "um nome tem de 1 a 50 bytes: letras, números, _ - . e nenhum espaço; \
        começa com letra ou número"
    NAME_TAKEN "somebody here has that name; choose another"
        "alguém aqui já tem esse nome; escolha outro"
    NOBODY "nobody here has that name" "não tem ninguém aqui com esse nome"
    CONTROL_CHARACTERS "control characters cannot be sent; the line was not"
        "caracteres de controle não podem ser enviados; a linha não foi enviada"
    LINE_REFUSED "that line is too long and was not sent"
        "essa linha é longa demais e não foi enviada"
    TOO_LONG "that line is {} bytes too long and was not sent"
        "essa linha passa do limite em {} bytes e não foi enviada"
    LINE_NOT_UTF8 "a line that is not UTF-8 was not sent: {}"
        "uma linha que não está em UTF-8 não foi enviada: {}"
    TERMINAL_NOT_UTF8
        "This terminal does not use UTF-8: accented letters get lost; set it to UTF-8."
        "Este terminal não usa UTF-8: letras com acento se perdem; mude-o para UTF-8."
    FULL "no more connections can be taken now; try again later"
        "o servidor está lotado; tente mais tarde"
    NO_NAME_IN_TIME "no name was given in time" "você demorou demais para escolher um nome"
    NOT_UNDERSTOOD "the server did not understand that" "o servidor não entendeu isso"
    HELP "\
Type a line and press Enter to say it to everybody.
@name text  says it to one person alone; so does /name text
/list       shows who is here
/help       shows this
/quit       leaves
//text      says a line that begins with a slash
Tab completes names, Ctrl-C forgets the line, Up brings back the one before."
    "\
Digite um texto e tecle Enter para enviar a todos.
@nome texto  envia só a uma pessoa; /nome texto também
/clientes    mostra quem está no chat
/ajuda       mostra esta ajuda
/sair        sai do chat
//texto      envia uma linha que começa com barra
Tab completa nomes, Ctrl-C apaga a linha, seta para cima traz a anterior."
    CANNOT_CONNECT "cannot connect to {}: {}" "não foi possível conectar a {}: {}"
    REFUSED "connection refused; is the server running?" "conexão recusada; o servidor está no ar?"
    NO_SUCH_HOST "no address is known for that name" "endereço não encontrado"
    NO_ANSWER "no answer" "sem resposta"
    LOST "lost the server at {}: {}" "a conexão com {} caiu: {}"
    NOT_LINECHAT "what answers at {} is not linechat/1" "quem responde em {} não é linechat/1"
    CLOSED_BY "{} closed the connection: {}" "{} fechou a conexão: {}"
    CLOSED_CONNECTION "it closed the connection" "o servidor fechou a conexão"
    LINE_TOO_LONG "it sent a line too long" "o servidor mandou uma linha longa demais"
    STOPPED_ANSWERING "it stopped answering" "o servidor parou de responder"
    NOT_SENT "not sent: {}" "não enviado: {}"
    PERHAPS_NOT_SENT "perhaps not sent: {}" "talvez não enviado: {}"
    SOME_NOT_TAKEN "not all that was typed was taken" "nem tudo que foi digitado foi aceito"
    LEFT_AT_ONCE "did not wait for the server's BYE" "saiu sem esperar o BYE do servidor"
    NO_OUTPUT "cannot write to standard output: {}"
        "não foi possível escrever na saída padrão: {}"
    NO_SUCH_OPTION "there is no option {}; try --help" "não existe a opção {}; veja --help"
    NO_SUCH_LANGUAGE "--lang is en or pt, not '{}'" "--lang é en ou pt, e não '{}'"
    BAD_PORT "a port is a number from 1 to 65535, not '{}'"
        "a porta é um número de 1 a 65535, e não '{}'"
    CONTROL_IN_ARGUMENT "'{}' holds a control character; leave it out"
        "'{}' contém um caractere de controle; tire-o"
    TOO_MANY_WORDS "'{}' is too much: a host, a port and a name, nothing more; try --help"
        "'{}' sobra: um servidor, uma porta e um nome, nada mais; veja --help"
    VERSION "linechat-client {}\n" "linechat-client {}\n"
    USAGE "\
Usage: linechat-client [OPTIONS] [HOST[:PORT] | HOST PORT] [NAME]

Joins the linechat room at HOST (default: localhost, port 9999) as NAME.
/help tells what can be typed there.

Options:
 --bell        ring on a private message or one with your name
 --no-color    no colours (nor with NO_COLOR or TERM=dumb set)
 --no-time     no times of messages (nor in a narrow window)
 --lang en|pt  English or Portuguese (default: what the locale says)
 --help        show this
 --version     show the version
"
    "\
Uso: linechat-client [OPÇÕES] [SERVIDOR[:PORTA] | SERVIDOR PORTA] [NOME]

Entra na sala de SERVIDOR (se nada for dito: localhost, porta 9999) como NOME.
/ajuda mostra, lá dentro, os comandos.

Opções:
 --bell        toca numa mensagem privada ou com o seu nome
 --no-color    sem cores (nem com NO_COLOR ou TERM=dumb)
 --no-time     sem a hora das mensagens (nem em janela estreita)
 --lang en|pt  inglês ou português (se nada for dito: o que diz o locale)
 --help        mostra isto
 --version     mostra a versão
"
    }
}

// ---- The widths of characters ------------------------------------------------------------------

const SKIN_TONES: RangeInclusive<char> = '\u{1f3fb}'..='\u{1f3ff}';
const HALVES_OF_FLAGS: RangeInclusive<char> = '\u{1f1e6}'..='\u{1f1ff}';

/// Columns of a text in which nothing is painted.
fn width_of(text: &str) -> usize {
    text.chars().map(width).sum()
}

/// How many columns a terminal gives to a character: none to accents and other marks, two to the
/// scripts of East Asia and to emoji (Unicode 15, UAX #11). Among symbols whole blocks count as
/// wide, since a row that ends early does no harm, and one that a terminal breaks itself does. The
/// cursor is right in any case (see `Input::draw`).
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
