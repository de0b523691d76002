//! Plays a transcript: starts the server, the clients and whatever stands between them, takes one
//! step after the other, and sees to it that nobody receives a line that is not in the transcript.
//!
//! Absence is proved by order, never by waiting. A fence is a PING whose PONG is awaited: when it
//! comes, the server has dealt with all that this client had sent before, and has sent before it
//! all that it owed to this client. So before somebody else acts, those who have sent something
//! pass a fence, and at the end everybody passes two: after the first round all requests are dealt
//! with, and in the second whatever they caused must arrive before the PONG.

use crate::broken::{Proxy, Standing};
use crate::process::{Printed, Server, STUCK};
use crate::screen::Screen;
use crate::script::{Action, Deed, Part, Script, Step, Text};
use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long a line is awaited before a fence settles whether it comes at all.
const BEFORE_FENCE: Duration = Duration::from_millis(20);

/// Where transcripts are played.
#[derive(Default)]
pub struct Theatre {
    /// A server that is running already, as HOST:PORT.
    pub server: Option<String>,
    pub via: Via,
    pub proxy: Option<Arc<Proxy>>,
    /// Nobody cares any more for what is still being played.
    pub is_over: AtomicBool,
}

/// What the clients are.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub enum Via {
    #[default]
    Sockets,
    Nc,
    Telnet,
}

impl std::str::FromStr for Via {
    type Err = String;

    fn from_str(name: &str) -> Result<Via, String> {
        match name {
            "nc" => Ok(Via::Nc),
            "telnet" => Ok(Via::Telnet),
            _ => Err(format!("clients can be nc or telnet, not {name}")),
        }
    }
}

#[derive(PartialEq, Eq)]
pub enum Outcome {
    Passed,
    Failed(String),
    Skipped(&'static str),
}

impl Theatre {
    pub fn is_plain(&self) -> bool {
        self.server.is_none() && self.via == Via::Sockets
    }

    /// Why a script cannot be played here, if it cannot.
    fn misses(&self, script: &Script) -> Option<&'static str> {
        if self.server.is_some() {
            if !script.options.is_empty() {
                return Some("starts the server with options");
            }
            if script.has(&|action| {
                matches!(action, Action::Console(_) | Action::Signal(_) | Action::ServerExits(_))
            }) {
                return Some("watches or ends the server's process");
            }
        }
        if self.proxy.is_some() && script.has_deed(|deed| matches!(deed, Deed::StopsReading)) {
            return Some("needs a server that nothing buffers for");
        }
        let is_ours = self.is_plain();
        if !is_ours && script.has_deed(|deed| matches!(deed, Deed::Runs(..))) {
            return Some("is about linechat-client");
        }
        let at_terminal = |deed: &Deed| matches!(deed, Deed::Runs(Some(_), _));
        if !cfg!(target_os = "linux") && script.has_deed(at_terminal) {
            return Some("needs the script(1) of Linux");
        }
        if cfg!(windows) && script.has(&|action| matches!(action, Action::Signal(_))) {
            return Some("sends a signal");
        }
        let cannot: fn(&Deed) -> bool = match self.via {
            Via::Sockets => return None,
            Via::Nc => |deed| matches!(deed, Deed::Resets),
            Via::Telnet => |deed| match deed {
                Deed::Resets | Deed::HalfCloses | Deed::ReceivesBytes(_) => true,
                // One whose output nobody takes cannot be ended with its terminal.
                Deed::StopsReading => true,
                Deed::Sends(text) => !text.can_be_typed(),
                _ => false,
            },
        };
        // An nc whose output nobody takes does not look at its input either.
        let is_stuck = script.has_deed(|deed| matches!(deed, Deed::StopsReading))
            && script.has_deed(|deed| matches!(deed, Deed::HalfCloses));
        (is_stuck || script.has_deed(cannot)).then_some("does what this program cannot")
    }
}

impl Text {
    /// Whether telnet sends it as it is: it ends lines its own way, doubles the byte 255, and takes
    /// Ctrl-E, with the eighth bit or without, as a command.
    fn can_be_typed(&self) -> bool {
        let mut bytes = self.0.iter().flat_map(|part| match part {
            Part::Bytes(bytes) => bytes.as_slice(),
            _ => b"",
        });
        !bytes.any(|byte| matches!(byte, b'\r' | 0xff | 0x05 | 0x85))
    }
}

/// How a client's bytes travel.
enum Line {
    Socket(TcpStream),
    /// A real program: what is written to it is typed, what it prints is received.
    Program {
        child: Child,
        typed: Option<ChildStdin>,
        printed: Printed,
        complaints: Printed,
    },
}

/// The terminal that linechat-client runs at: script(1) holds it, and `screen` shows it.
struct Terminal {
    screen: Screen,
    /// Its file, with which its size is set.
    path: String,
    /// Its settings before the client took it over, which it must have again in the end.
    settings: String,
    /// The client's process, once it is known.
    process: Option<u32>,
}

struct Client {
    name: String,
    line: Line,
    /// Not yet looked for in the transcript.
    received: Vec<u8>,
    /// From standard error, not yet looked for in the transcript.
    complaints: Vec<u8>,
    /// What the transcript has seen.
    history: Vec<String>,
    /// Expected at some time, in this order.
    sometime: VecDeque<Pattern>,
    is_closed: bool,
    has_half_closed: bool,
    is_stalled: bool,
    /// The transcript says that the server ends the connection.
    was_to_close: bool,
    /// What was sent last is not a whole line.
    is_mid_line: bool,
    /// Has sent something since its last fence.
    is_unfenced: bool,
    /// How many LEFT may come that nobody's request causes.
    awaited_leaves: usize,
    /// It is linechat-client, or the suite where that is the server: neither passes a fence.
    is_ours: bool,
    /// What ends a line as it is received: telnet and linechat-client show them ended by LF.
    ending: &'static str,
    terminal: Option<Terminal>,
}

impl Client {
    fn new(name: &str, line: Line, ending: &'static str) -> Client {
        Client {
            name: name.to_owned(),
            line,
            received: Vec::new(),
            complaints: Vec::new(),
            history: Vec::new(),
            sometime: VecDeque::new(),
            is_closed: false,
            has_half_closed: false,
            is_stalled: false,
            was_to_close: false,
            is_mid_line: false,
            is_unfenced: false,
            awaited_leaves: 0,
            is_ours: false,
            ending,
            terminal: None,
        }
    }

    /// The terminal must have its settings again, which a last line tells.
    fn check_settings(&mut self) -> Result<(), String> {
        let Some(Terminal { settings, .. }) = &self.terminal else { return Ok(()) };
        let last = format!("{settings}\n");
        match self.received.strip_suffix(last.as_bytes()).map(<[u8]>::len) {
            Some(length) => {
                self.received.truncate(length);
                Ok(())
            }
            None => Err(side_by_side(settings, &self.unread())),
        }
    }

    fn send(&mut self, bytes: &[u8]) {
        let sent = match &mut self.line {
            Line::Socket(socket) => socket.write_all(bytes),
            Line::Program { typed: Some(typed), .. } => typed.write_all(bytes),
            Line::Program { typed: None, .. } => Ok(()),
        };
        // A server that has closed shows in what is received, or is not.
        if sent.is_ok() {
            self.is_mid_line = bytes.last().is_some_and(|&last| last != b'\n');
            self.is_unfenced = true;
        }
    }

    fn end_input(&mut self) {
        match &mut self.line {
            Line::Socket(socket) => drop(socket.shutdown(Shutdown::Write)),
            Line::Program { typed, .. } => *typed = None,
        }
        self.has_half_closed = true;
    }

    /// Receives something more, or the end. Returns false when the time is over.
    fn read(&mut self, patience: Duration) -> bool {
        if self.is_closed {
            return false;
        }
        let read = match &mut self.line {
            Line::Socket(socket) => {
                let mut buffer = [0; 16 * 1024];
                let read =
                    socket.set_read_timeout(Some(patience)).and_then(|()| socket.read(&mut buffer));
                read.map(|length| {
                    self.received.extend(&buffer[..length]);
                    length > 0
                })
            }
            Line::Program { printed, .. } => match &mut self.terminal {
                None => printed.read(&mut self.received, patience),
                Some(Terminal { screen, .. }) => {
                    let mut bytes = Vec::new();
                    let read = printed.read(&mut bytes, patience);
                    self.received.extend(screen.print(&bytes));
                    read
                }
            },
        };
        match read {
            Ok(true) => true,
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                false
            }
            // A reset ends a connection like anything else.
            Ok(false) | Err(_) => {
                self.is_closed = true;
                let farewell = b"Connection closed by foreign host.\n";
                if let (Line::Program { .. }, true) =
                    (&self.line, self.received.ends_with(farewell))
                {
                    self.received.truncate(self.received.len() - farewell.len());
                }
                true
            }
        }
    }

    /// Waits for something more until the run is stuck, or over.
    fn read_patiently(&mut self, theatre: &Theatre) -> bool {
        self.read_for(STUCK, theatre)
    }

    /// Waits so long for something more, unless the run is over.
    fn read_for(&mut self, patience: Duration, theatre: &Theatre) -> bool {
        let is_over = || theatre.is_over.load(Ordering::Relaxed);
        let slices = patience.as_millis() / BEFORE_FENCE.as_millis();
        (0..slices).any(|_| is_over() || self.read(BEFORE_FENCE)) && !is_over()
    }

    fn can_pass_fence(&self) -> bool {
        let is_silent = self.is_closed || self.has_half_closed || self.is_stalled;
        !(is_silent || self.is_mid_line || self.is_ours)
    }

    /// Takes a whole line from what has been received.
    fn take_line(&mut self) -> Option<Vec<u8>> {
        let end = self.received.iter().position(|&byte| byte == b'\n')?;
        Some(self.received.drain(..=end).collect())
    }

    fn unread(&self) -> String {
        show(&self.received)
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        if let Line::Program { child, .. } = &mut self.line {
            // script(1) ends with the program that it has started, or, save where that is a
            // shell's, ends it if it is asked to, which SIGKILL does not.
            let ended = child.try_wait().is_ok_and(|status| status.is_some());
            let ours = self.terminal.as_ref().and_then(|terminal| terminal.process);
            let (process, signal) = ours.map_or((child.id(), "TERM"), |ours| (ours, "KILL"));
            if !ended && crate::process::signal(process, signal).is_err() {
                let _ = child.kill();
            }
            let _ = child.wait();
        }
    }
}

/// A text with everything filled in: pieces with any text, but some, between each two.
struct Pattern(Vec<Vec<u8>>);

impl Pattern {
    fn matches(&self, text: &[u8]) -> bool {
        fn rest_matches(pieces: &[Vec<u8>], text: &[u8]) -> bool {
            match pieces {
                [] => text.is_empty(),
                [piece, pieces @ ..] => (1..=text.len()).any(|skipped| {
                    // Any text but none, and nothing that is not text.
                    text[..skipped].iter().all(|&byte| byte >= b' ')
                        && text[skipped..]
                            .strip_prefix(piece.as_slice())
                            .is_some_and(|text| rest_matches(pieces, text))
                }),
            }
        }
        match self.0.as_slice() {
            [whole] => text == whole,
            [first, pieces @ ..] => {
                text.strip_prefix(first.as_slice()).is_some_and(|text| rest_matches(pieces, text))
            }
            [] => text.is_empty(),
        }
    }

    fn show(&self) -> String {
        self.0.iter().map(|piece| show(piece)).collect::<Vec<_>>().join("*")
    }
}

/// Bytes as a person reads them, long ones cut.
fn show(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes).escape_debug().to_string();
    match text.char_indices().nth(120) {
        Some((end, _)) => format!("{}… ({} bytes)", &text[..end], bytes.len()),
        None => text,
    }
}

pub struct Stage<'a> {
    theatre: &'a Theatre,
    address: String,
    server: Option<Server>,
    /// Where the suite itself is the server.
    listener: Option<TcpListener>,
    _proxy: Option<Standing>,
    clients: Vec<Client>,
    fences: u32,
    round: usize,
    /// Things may happen that no fence waits for: a time-out, a signal, another program.
    is_loose: bool,
    watches_console: bool,
}

impl<'a> Stage<'a> {
    pub fn play(theatre: &'a Theatre, script: &Script) -> Outcome {
        if let Some(why) = theatre.misses(script) {
            return Outcome::Skipped(why);
        }
        let file = script.name.split(':').next().unwrap_or_default();
        let result = Stage::set(theatre, script).and_then(|mut stage| {
            let played = script.steps.iter().try_for_each(|step| stage.step(file, step));
            let ended = played.and_then(|()| stage.end());
            ended.map_err(|error| error + &stage.history())
        });
        match result {
            Ok(()) => Outcome::Passed,
            Err(error) => Outcome::Failed(error),
        }
    }

    fn set(theatre: &'a Theatre, script: &Script) -> Result<Stage<'a>, String> {
        let listener = script.plays_server.then(|| TcpListener::bind("127.0.0.1:0"));
        let listener = listener.transpose().map_err(|error| error.to_string())?;
        let played = listener.as_ref().and_then(|listener| listener.local_addr().ok());
        let (server, mut address) = match (&theatre.server, played) {
            (_, Some(address)) => (None, address.to_string()),
            (Some(address), None) => (None, address.clone()),
            (None, None) => {
                let server = Server::start(&script.options)?;
                let address = server.address.clone();
                (Some(server), address)
            }
        };
        let proxy = theatre.proxy.as_ref().filter(|_| listener.is_none());
        let proxy = proxy.map(|proxy| proxy.in_front_of(&address)).transpose();
        let proxy = proxy.map_err(|error| error.to_string())?;
        if let Some(proxy) = &proxy {
            address = proxy.address.clone();
        }
        let mut stage = Stage {
            theatre,
            address,
            server,
            listener,
            _proxy: proxy,
            clients: Vec::new(),
            fences: 0,
            round: 0,
            is_loose: !script.options.is_empty(),
            watches_console: script.has(&|action| matches!(action, Action::Console(_))),
        };
        if theatre.server.is_some() {
            stage.wait_until_alone()?;
        }
        Ok(stage)
    }

    /// Waits in a shared server's room until those of the last transcript have left.
    fn wait_until_alone(&mut self) -> Result<(), String> {
        let here = ["stage".to_owned()];
        self.client(&here, &Deed::Connects)?;
        self.client(&here, &Deed::Sends(Text(vec![Part::Bytes(b"NAME stage\n".to_vec())])))?;
        let stage = &mut self.clients[0];
        loop {
            let line = stage.take_line().unwrap_or_default();
            let line = String::from_utf8_lossy(&line);
            let mut words = line.split_whitespace();
            let is_count = matches!(words.next(), Some("WELCOME" | "LEFT"));
            if is_count && words.nth(1) == Some("1") {
                break;
            }
            if line.is_empty() && !stage.read_patiently(self.theatre) {
                return Err("the server's room does not become empty".to_owned());
            }
        }
        stage.send(b"QUIT\n");
        while !stage.is_closed {
            if !stage.read_patiently(self.theatre) {
                return Err("the server does not close after QUIT".to_owned());
            }
        }
        self.clients.clear();
        Ok(())
    }

    fn step(&mut self, file: &str, step: &Step) -> Result<(), String> {
        if self.theatre.is_over.load(Ordering::Relaxed) {
            return Err("no longer of interest".to_owned());
        }
        let result = match &step.action {
            Action::InTheRoom(names) => self.fill(names),
            Action::Client(names, deed) => self.client(names, deed),
            Action::Console(text) => self.console(text),
            Action::Signal(signal) => self.signal(signal),
            Action::ServerExits(status) => self.server_exits(*status),
            Action::Times(rounds, steps) => {
                for round in 1..=*rounds {
                    self.round = round;
                    steps.iter().try_for_each(|step| self.step(file, step))?;
                }
                return Ok(());
            }
        };
        result.map_err(|what| {
            format!("        {file}:{}: {}\n{}", step.line, step.source, indent(&what))
        })
    }

    /// `in the room`: everybody joins in turn, with all that each is told of it.
    fn fill(&mut self, names: &[String]) -> Result<(), String> {
        if !self.clients.is_empty() {
            return Err("'in the room' stands before everything else".to_owned());
        }
        let line = |text: String| Text(vec![Part::Bytes(text.into_bytes())]);
        for (count, name) in (1..).zip(names) {
            let (here, others) = (&names[count - 1..count], &names[..count - 1]);
            self.client(here, &Deed::Connects)?;
            self.client(here, &Deed::Receives("HELLO linechat/1 *".parse()?))?;
            self.client(here, &Deed::Sends(line(format!("NAME {name}\n"))))?;
            self.client(here, &Deed::Receives(line(format!("WELCOME {name} {count}"))))?;
            self.client(others, &Deed::Receives(line(format!("JOINED {name} {count}"))))?;
            let mut roster = Vec::<String>::new();
            for name in names[..count].iter().take_while(|_| count <= 100) {
                match roster.last_mut() {
                    Some(last) if last.len() + 1 + name.len() + 2 <= 4096 => {
                        *last += &format!(" {name}")
                    }
                    _ => roster.push(format!("USERS {count} {name}")),
                }
            }
            for users in roster {
                self.client(&names[..count], &Deed::Receives(line(users)))?;
            }
        }
        Ok(())
    }

    fn client(&mut self, names: &[String], deed: &Deed) -> Result<(), String> {
        names.iter().try_for_each(|name| self.act(name, deed))
    }

    fn act(&mut self, name: &str, deed: &Deed) -> Result<(), String> {
        match deed {
            Deed::Connects => {
                self.fence_all_but(name)?;
                let line = self.connect()?;
                let ending = if self.theatre.via == Via::Telnet { "\n" } else { "\r\n" };
                self.clients.push(Client::new(name, line, ending));
                if self.theatre.via == Via::Telnet {
                    self.skip_telnet_greeting(name)?;
                }
            }
            Deed::Runs(columns, arguments) => {
                self.fence_all_but(name)?;
                let line = self.run_client(*columns, arguments)?;
                self.add_ours(name, line);
                if let Some(columns) = columns {
                    self.await_terminal(name, *columns)?;
                }
                self.take_the_servers_part()?;
            }
            Deed::Shows(text) => {
                self.fence_all_but(name)?;
                let theatre = self.theatre;
                let expected = self.fill_in(text);
                let client = self.find(name)?;
                let since = Instant::now();
                loop {
                    let terminal = client.terminal.as_ref().ok_or("there is no terminal")?;
                    let line = terminal.screen.line_at_cursor();
                    if expected.matches(line.as_bytes()) {
                        break;
                    }
                    let is_stuck = client.is_closed || since.elapsed() > STUCK;
                    if is_stuck || !client.read_patiently(theatre) {
                        return Err(side_by_side(&expected.show(), &line));
                    }
                }
            }
            Deed::Resizes(columns) => {
                let client = self.find(name)?;
                let terminal = client.terminal.as_mut().ok_or("there is no terminal")?;
                terminal.screen.resize(*columns);
                let mut stty = Command::new("stty");
                stty.args(["-F", &terminal.path, "columns", &columns.to_string()]);
                if !stty.status().is_ok_and(|status| status.success()) {
                    return Err("the terminal cannot be resized".to_owned());
                }
            }
            Deed::ReceivesSignal(signal) => {
                let client = self.find(name)?;
                let terminal = client.terminal.as_ref().ok_or("there is no terminal")?;
                let process = terminal.process.ok_or("there is no process")?;
                crate::process::signal(process, signal)?;
            }
            Deed::Sends(text) => {
                self.fence_all_but(name)?;
                let bytes = self.fill_in(text).0.concat();
                self.find(name)?.send(&bytes);
            }
            Deed::Receives(text) => {
                let pattern = self.fill_in(text);
                let line = self.next_line(name, &pattern)?;
                self.compare(name, &pattern, &line)?;
            }
            Deed::ReceivesSometime(text) => {
                let pattern = self.fill_in(text);
                self.find(name)?.sometime.push_back(pattern);
            }
            Deed::ReceivesBytes(text) => {
                let expected = self.fill_in(text).0.concat();
                while self.find(name)?.received.len() < expected.len() {
                    self.read_more(name)?;
                }
                let client = self.find(name)?;
                let received: Vec<u8> = client.received.drain(..expected.len()).collect();
                client.history.push(show(&received));
                if received != expected {
                    return Err(side_by_side(&show(&expected), &show(&received)));
                }
            }
            Deed::IsClosed => {
                self.fence_all_but(name)?;
                let via = self.theatre.via;
                let client = self.find(name)?;
                if let (Via::Nc, Line::Program { .. }) = (via, &client.line) {
                    // nc waits for the end of what is typed too. Were the connection still open,
                    // the answer to this would be received before that ends it.
                    client.send(b"PING\n");
                    client.end_input();
                }
                self.find(name)?.read(BEFORE_FENCE);
                if !self.find(name)?.is_closed && self.closes_promptly(name)? {
                    return Err(format!("{name}'s connection stays open, though others go on"));
                }
                while !self.find(name)?.is_closed {
                    if self.read_more(name).is_err() {
                        return Err(format!("{name}'s connection is still open"));
                    }
                }
                self.find(name)?.was_to_close = true;
                self.nothing_unread(name)?;
            }
            Deed::Closes | Deed::HalfCloses | Deed::Resets => {
                self.fence_all_but(name)?;
                if !matches!(deed, Deed::HalfCloses) {
                    self.fence(name)?;
                    self.nothing_unread(name)?;
                }
                self.await_leave();
                let client = self.find(name)?;
                match (deed, &mut client.line) {
                    (Deed::HalfCloses, _) => client.end_input(),
                    (Deed::Resets, Line::Socket(socket)) => {
                        // Linux resets what is closed before all of it has been read.
                        let answered = socket
                            .set_read_timeout(Some(STUCK))
                            .and_then(|()| socket.write_all(b"PING\n"))
                            .and_then(|()| socket.peek(&mut [0]));
                        answered.map_err(|error| format!("no PONG before the reset: {error}"))?;
                        self.forget(name);
                    }
                    _ => self.forget(name),
                }
            }
            Deed::StopsReading => {
                self.fence_all_but(name)?;
                self.fence(name)?;
                self.nothing_unread(name)?;
                self.await_leave();
                self.find(name)?.is_stalled = true;
            }
            Deed::Complains(text) => {
                let pattern = self.fill_in(text);
                let client = self.find(name)?;
                let Line::Program { complaints, .. } = &client.line else {
                    return Err(format!("{name} is not a program"));
                };
                while !client.complaints.contains(&b'\n') {
                    let unread = &mut client.complaints;
                    if !complaints.read(unread, STUCK).map_err(|error| error.to_string())? {
                        break;
                    }
                }
                let end = client.complaints.iter().position(|&byte| byte == b'\n');
                let line: Vec<u8> =
                    client.complaints.drain(..end.map_or(0, |end| end + 1)).collect();
                let line = line.strip_suffix(b"\n").unwrap_or(&line);
                if !pattern.matches(line) {
                    return Err(side_by_side(&pattern.show(), &show(line)));
                }
            }
            Deed::Exits(status) => {
                while !self.find(name)?.is_closed {
                    self.read_more(name)?;
                }
                self.find(name)?.check_settings()?;
                self.nothing_unread(name)?;
                let client = self.find(name)?;
                let mut more = std::mem::take(&mut client.complaints);
                let Line::Program { child, complaints, .. } = &mut client.line else {
                    return Err(format!("{name} is not a program"));
                };
                let ended = child.wait().map_err(|error| error.to_string())?;
                while let Ok(true) = complaints.read(&mut more, STUCK) {}
                if ended.code() != Some(*status) || !more.is_empty() {
                    let received = format!("{ended} and '{}' on standard error", show(&more));
                    return Err(side_by_side(&format!("exit status {status}"), &received));
                }
                self.forget(name);
            }
        }
        Ok(())
    }

    /// Passes several fences for somebody else, if our own server is played to directly, which by
    /// then has ended a connection that it is to end. Returns whether it should be but is not.
    fn closes_promptly(&mut self, name: &str) -> Result<bool, String> {
        if !self.theatre.is_plain() || self.theatre.proxy.is_some() || self.is_loose {
            return Ok(false);
        }
        let other = |client: &Client| client.name != name && client.can_pass_fence();
        let Some(other) = self.clients.iter().position(other) else { return Ok(false) };
        for _ in 0..3 {
            self.fence_at(other)?;
        }
        let client = self.find(name)?;
        while !client.is_closed && client.read(BEFORE_FENCE) {}
        Ok(!client.is_closed)
    }

    /// Somebody will be noticed to be gone, at a time that no fence tells.
    fn await_leave(&mut self) {
        self.clients.iter_mut().for_each(|client| client.awaited_leaves += 1);
    }

    fn connect(&self) -> Result<Line, String> {
        let (host, port) = self.address.rsplit_once(':').ok_or("the server is HOST:PORT")?;
        let mut command = match self.theatre.via {
            Via::Sockets => {
                let socket = TcpStream::connect(&self.address);
                let socket = socket.and_then(|socket| {
                    socket.set_nodelay(true)?;
                    Ok(socket)
                });
                return match socket {
                    Ok(socket) => Ok(Line::Socket(socket)),
                    Err(error) => Err(format!("cannot connect to {}: {error}", self.address)),
                };
            }
            Via::Nc => {
                let mut command = Command::new("nc");
                command.args(["-N", host, port]);
                command
            }
            Via::Telnet => {
                // telnet wants a terminal to type at, and makes it echo; what it prints comes
                // through a descriptor of its own. It takes bytes of UTF-8 for the terminal's
                // special characters, whose eighth bit it ignores, so there are none here.
                let mut command = Command::new("sh");
                let special =
                    "intr quit erase kill eof eol susp start stop lnext werase rprnt discard";
                let special = special.split(' ').map(|name| format!("{name} 255 "));
                let special: String = special.collect();
                let telnet = format!("stty raw {special}; exec telnet -E {host} {port} >&3");
                command.arg("-c").arg(format!(
                    "exec 3>&1; exec script --quiet --command '{telnet}' /dev/null >/dev/null"
                ));
                command
            }
        };
        start(&mut command)
    }

    /// Takes away what telnet says for itself before the server's first line.
    fn skip_telnet_greeting(&mut self, name: &str) -> Result<(), String> {
        let theatre = self.theatre;
        let last = b"Escape character is 'off'.\n";
        let client = self.find(name)?;
        loop {
            let received = &client.received;
            if let Some(at) = received.windows(last.len()).position(|window| window == last) {
                client.received.drain(..at + last.len());
                return Ok(());
            }
            if client.is_closed || !client.read_patiently(theatre) {
                return Err(format!("telnet does not connect: {}", client.unread()));
            }
        }
    }

    /// Starts linechat-client; words like `LANG=pt` before its arguments are for its environment.
    fn run_client(&self, columns: Option<usize>, arguments: &Text) -> Result<Line, String> {
        let arguments = self.fill_in(arguments).0.concat();
        let arguments = String::from_utf8_lossy(&arguments);
        let mut words = arguments.split_whitespace().peekable();
        let client = env!("CARGO_BIN_EXE_linechat-client");
        let mut command = Command::new(if columns.is_some() { "script" } else { client });
        command.env_remove("NO_COLOR").envs([("TERM", "xterm"), ("LC_ALL", "")]);
        while let Some((name, value)) = words.peek().and_then(|word| word.split_once('=')) {
            if name.starts_with('-') {
                break;
            }
            command.env(name, value);
            words.next();
        }
        match columns {
            None => command.args(words),
            Some(columns) => command.env("SHELL", "/bin/sh").args([
                "--quiet",
                "--return",
                "--command",
                &format!(
                    "stty columns {columns} rows 24; tty; stty -g; \
                     sh -c 'echo $$; exec {client} {}'; status=$?; stty -g; exit $status",
                    words.collect::<Vec<_>>().join(" ")
                ),
                "/dev/null",
            ]),
        };
        start(&mut command)
    }

    fn add_ours(&mut self, name: &str, line: Line) {
        let mut client = Client::new(name, line, "\n");
        client.is_ours = true;
        self.clients.push(client);
        self.is_loose = true;
    }

    /// Waits until linechat-client is about to start at its terminal, even when the run is over:
    /// only then is it known which process to end.
    fn await_terminal(&mut self, name: &str, columns: usize) -> Result<(), String> {
        let client = self.find(name)?;
        let screen = Screen::new(columns);
        let (path, settings, process) = (String::new(), String::new(), None);
        client.terminal = Some(Terminal { screen, path, settings, process });
        let mut lines = Vec::new();
        while lines.len() < 3 {
            match client.take_line() {
                Some(line) => lines.push(String::from_utf8_lossy(&line).trim().to_owned()),
                None if !client.is_closed && client.read(STUCK) => {}
                None => return Err(format!("there is no terminal: {}", client.unread())),
            }
        }
        if let (Some(terminal), [path, settings, process]) = (&mut client.terminal, &lines[..]) {
            (terminal.path, terminal.settings) = (path.clone(), settings.clone());
            terminal.process = process.parse().ok();
        }
        Ok(())
    }

    /// Where the suite is the server, the connection of who has just started is its to serve.
    fn take_the_servers_part(&mut self) -> Result<(), String> {
        if let Some(listener) = &self.listener {
            let (socket, _) = listener.accept().map_err(|error| error.to_string())?;
            self.add_ours("server", Line::Socket(socket));
        }
        Ok(())
    }

    fn fill_in(&self, text: &Text) -> Pattern {
        let mut pieces = vec![Vec::new()];
        for part in &text.0 {
            let known = match part {
                Part::Bytes(bytes) => Some(bytes.clone()),
                Part::Round => Some(self.round.to_string().into_bytes()),
                Part::Server => Some(self.address.clone().into_bytes()),
                Part::AddressOf(name) => {
                    self.address_of(name).map(|it| it.to_string().into_bytes())
                }
                Part::Anything => None,
            };
            match (known, pieces.last_mut()) {
                (Some(bytes), Some(piece)) => piece.extend(bytes),
                _ => pieces.push(Vec::new()),
            }
        }
        Pattern(pieces)
    }

    /// Where somebody's connection comes from, as the server sees it; unknown behind a proxy or
    /// another program.
    fn address_of(&self, name: &str) -> Option<SocketAddr> {
        let client = self.clients.iter().find(|client| client.name == name)?;
        match &client.line {
            Line::Socket(socket) if self.theatre.proxy.is_none() => socket.local_addr().ok(),
            _ => None,
        }
    }

    fn find(&mut self, name: &str) -> Result<&mut Client, String> {
        let client = self.clients.iter_mut().find(|client| client.name == name);
        client.ok_or(format!("{name} is not connected"))
    }

    fn forget(&mut self, name: &str) {
        self.clients.retain(|client| client.name != name);
    }

    /// Passes a fence for everybody who has sent something, save one.
    fn fence_all_but(&mut self, name: &str) -> Result<(), String> {
        for at in 0..self.clients.len() {
            if self.clients[at].is_unfenced && self.clients[at].name != name {
                self.fence_at(at)?;
            }
        }
        Ok(())
    }

    fn fence(&mut self, name: &str) -> Result<bool, String> {
        match self.clients.iter().position(|client| client.name == name) {
            Some(at) => self.fence_at(at),
            None => Err(format!("{name} is not connected")),
        }
    }

    /// Passes a fence, if this client can. Returns whether anything came before its PONG.
    fn fence_at(&mut self, at: usize) -> Result<bool, String> {
        let client = &mut self.clients[at];
        if !client.can_pass_fence() {
            return Ok(false);
        }
        let before = client.received.len();
        self.fences += 1;
        let pong = format!("PONG fence-{}", self.fences).into_bytes();
        client.send(format!("PING fence-{}\n", self.fences).as_bytes());
        let mut searched = 0;
        loop {
            // Only whole lines are looked at.
            let end =
                client.received.iter().rposition(|&byte| byte == b'\n').map_or(0, |at| at + 1);
            let lines = &client.received[searched.min(end)..end];
            let found = lines.windows(pong.len()).position(|window| window == pong);
            if let Some(found) = found.map(|found| found + searched.min(end)) {
                let ending = client.received[found + pong.len()..].iter().position(|&b| b == b'\n');
                let line_end = found + pong.len() + ending.unwrap_or(0) + 1;
                let line: Vec<u8> = client.received.drain(found..line_end).collect();
                client.is_unfenced = false;
                return match without_ending(&line, client.ending) == pong {
                    true => Ok(found > before),
                    false => Err(side_by_side(&show(&pong), &show(&line))),
                };
            }
            searched = end;
            if client.is_closed {
                return Ok(true);
            }
            if !client.read_patiently(self.theatre) {
                return Err(format!("{} gets no PONG; unread: {}", client.name, client.unread()));
            }
        }
    }

    /// Waits for something more to arrive. An error says that nothing will.
    fn read_more(&mut self, name: &str) -> Result<(), String> {
        // nc does not show that a fence met a closed connection, so it gets more time before one.
        let theatre = self.theatre;
        let patience = if theatre.via == Via::Nc { STUCK / 15 } else { BEFORE_FENCE };
        if self.find(name)?.read_for(patience, theatre) {
            return Ok(());
        }
        self.fence_all_but(name)?;
        if self.fence(name)? {
            return Ok(());
        }
        // What somebody has sent who can pass no fence may still be on its way.
        let is_loose = self.is_loose
            || self.clients.iter().any(|client| client.is_unfenced && !client.can_pass_fence());
        let client = self.find(name)?;
        let may_wait = is_loose || client.awaited_leaves > 0 || !client.can_pass_fence();
        match may_wait && client.read_patiently(theatre) {
            true => Ok(()),
            false => Err(format!("nothing more in time; unread: '{}'", client.unread())),
        }
    }

    /// The next line, whatever it is; lines expected sometime are dealt with on the way.
    fn next_line(&mut self, name: &str, expected: &Pattern) -> Result<Vec<u8>, String> {
        loop {
            let client = self.find(name)?;
            if let Some(line) = client.take_line() {
                let text = without_ending(&line, client.ending);
                let is_due = client.sometime.front().is_some_and(|due| due.matches(text));
                if is_due && !expected.matches(text) {
                    client.history.push(show(text));
                    client.sometime.pop_front();
                    continue;
                }
                return Ok(line);
            }
            if client.is_closed {
                let received = format!("[closed] {}", client.unread());
                return Err(side_by_side(&expected.show(), &received));
            }
            if let Err(what) = self.read_more(name) {
                return Err(side_by_side(&expected.show(), &what));
            }
        }
    }

    fn compare(&mut self, name: &str, expected: &Pattern, line: &[u8]) -> Result<(), String> {
        let client = self.find(name)?;
        let text = without_ending(line, client.ending);
        client.history.push(show(text));
        if text.starts_with(b"LEFT ") {
            client.awaited_leaves = client.awaited_leaves.saturating_sub(1);
        }
        match expected.matches(text) {
            true => Ok(()),
            false => Err(side_by_side(&expected.show(), &show(text))),
        }
    }

    fn nothing_unread(&mut self, name: &str) -> Result<(), String> {
        let client = self.find(name)?;
        while !client.sometime.is_empty() {
            let Some(line) = client.take_line() else { break };
            let text = without_ending(&line, client.ending);
            if !client.sometime.front().is_some_and(|due| due.matches(text)) {
                return Err(format!("{name} received too much: {}", show(&line)));
            }
            client.history.push(show(text));
            client.sometime.pop_front();
        }
        match client.received.is_empty() {
            true => Ok(()),
            false => Err(format!("{name} received too much: {}", client.unread())),
        }
    }

    fn console(&mut self, text: &Text) -> Result<(), String> {
        let expected = self.fill_in(text);
        let server = self.server.as_mut().ok_or("there is no console")?;
        let line = server.next_line()?.unwrap_or("nothing more".to_owned());
        match expected.matches(line.as_bytes()) {
            true => Ok(()),
            false => Err(side_by_side(&expected.show(), &line)),
        }
    }

    fn signal(&mut self, signal: &str) -> Result<(), String> {
        for at in 0..self.clients.len() {
            self.fence_at(at)?;
        }
        self.is_loose = true;
        let server = self.server.as_ref().ok_or("there is no server to signal")?;
        crate::process::signal(server.child.id(), signal)?;
        if signal == "KILL" {
            self.server = None;
        }
        Ok(())
    }

    fn server_exits(&mut self, status: i32) -> Result<(), String> {
        let server = self.server.as_mut().ok_or("there is no server")?;
        if let (true, Some(line)) = (self.watches_console, server.next_line()?) {
            return Err(format!("a line of the console that is not in the transcript: {line}"));
        }
        let ended = server.child.wait().map_err(|error| error.to_string())?;
        let complaints = server.complaints();
        match ended.code() == Some(status) && complaints.is_empty() {
            true => Ok(()),
            false => Err(side_by_side(
                &format!("exit status {status}"),
                &format!("{ended} {complaints}"),
            )),
        }
    }

    /// Nobody may have received more than what the transcript says.
    fn end(&mut self) -> Result<(), String> {
        for _ in 0..2 {
            for at in 0..self.clients.len() {
                self.fence_at(at)?;
            }
        }
        let names: Vec<_> = self.clients.iter().map(|client| client.name.clone()).collect();
        for name in &names {
            if self.find(name)?.is_stalled {
                continue;
            }
            self.nothing_unread(name)?;
            let client = self.find(name)?;
            if client.is_closed && !(client.was_to_close || client.has_half_closed) {
                return Err(format!("the server has closed {name}'s connection"));
            }
            let is_ours = client.is_ours;
            while !self.find(name)?.sometime.is_empty() {
                self.read_more(name).map_err(|what| format!("{name} was to receive: {what}"))?;
                self.nothing_unread(name)?;
            }
            if is_ours {
                return Err(format!("the transcript does not say how {name} exits"));
            }
            while self.find(name)?.has_half_closed && !self.find(name)?.is_closed {
                self.read_more(name)?;
            }
            self.nothing_unread(name)?;
        }
        let Some(server) = &mut self.server else { return Ok(()) };
        if server.child.try_wait().is_ok_and(|ended| ended.is_none()) {
            let _ = server.child.kill();
            if let (true, Some(line)) = (self.watches_console, server.next_line()?) {
                return Err(format!("a line of the console that is not in the transcript: {line}"));
            }
        } else if !server.child.wait().is_ok_and(|ended| ended.success()) {
            return Err(format!("the server has ended: {}", server.complaints()));
        }
        match server.complaints() {
            complaints if complaints.is_empty() => Ok(()),
            complaints => Err(format!("the server complains: {complaints}")),
        }
    }

    /// What everybody had received when something went wrong.
    fn history(&self) -> String {
        let mut text = String::from("\n        received so far:");
        for client in &self.clients {
            let skipped = client.history.len().saturating_sub(12);
            text += &format!("\n          {}:", client.name);
            for line in &client.history[skipped..] {
                text += &format!("\n            {line}");
            }
            if !client.received.is_empty() {
                text += &format!("\n            not yet looked at: {}", client.unread());
            }
        }
        text
    }
}

/// A line without what must end it. What lacks that is left as it is and matches nothing.
fn without_ending<'a>(line: &'a [u8], ending: &str) -> &'a [u8] {
    line.strip_suffix(ending.as_bytes()).unwrap_or(line)
}

fn side_by_side(expected: &str, received: &str) -> String {
    format!("expected: {expected}\nreceived: {received}")
}

fn indent(text: &str) -> String {
    text.lines().map(|line| format!("          {line}")).collect::<Vec<_>>().join("\n")
}

fn start(command: &mut Command) -> Result<Line, String> {
    let spawned =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let mut child = spawned.map_err(|error| format!("cannot start {command:?}: {error}"))?;
    let typed = child.stdin.take();
    let printed = Printed::by(child.stdout.take());
    let complaints = Printed::by(child.stderr.take());
    Ok(Line::Program { child, typed, printed, complaints })
}
