//! linechat-client: a plain client for a linechat room, for a terminal or a script.
//!
//! Try it, with a server running (see server.rs):
//!
//!     cargo run --release --bin linechat-client              (or: make run-client)
//!     echo hello | linechat-client localhost:9999 bot
//!
//! Two threads do nothing but wait, one for the server and one for the person typing, and hand
//! what comes to the main thread, which has all the state. So what arrives is shown while
//! somebody types, and what is typed is sent while much arrives. PROTOCOL.md says what goes over
//! the wire.
//!
//! Top to bottom: the limits, what is typed, what arrives, the conversation, the command line.

use std::io::{self, BufRead, BufReader, IsTerminal, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::process::ExitCode;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread;

const DEFAULT_HOST: &str = "localhost";
const DEFAULT_PORT: u16 = 9999;
/// Bytes of a request before its line ending (PROTOCOL.md, "Limits").
const MAX_REQUEST: usize = 4000;
/// Bytes of a line from the server, its ending included (PROTOCOL.md, "Limits").
const MAX_LINE: u64 = 4096;

const HELP: &str = "\
Type a line and press Enter to say it to everybody.
@name text  says it to one person alone
/list       shows who is here
/help       shows this
/quit       leaves
//text      says a line that begins with a slash";

// What is typed

/// What a typed line asks for.
#[derive(Debug, PartialEq, Eq)]
enum Typed {
    Nothing,
    Request(String),
    Help,
    Quit,
    Mistake(String),
}

fn understand(line: &str) -> Typed {
    let request = match line.strip_prefix('/') {
        _ if line.trim().is_empty() => return Typed::Nothing,
        None if line.starts_with('@') => match line.split_once(' ') {
            Some((_, text)) if !text.trim().is_empty() => format!("PRIV {line}"),
            _ => return Typed::Mistake(format!("say: {} text", line.trim_end())),
        },
        None => format!("MSG {line}"),
        Some(rest) if rest.starts_with('/') => format!("MSG {rest}"),
        Some(command) => match command.trim_end() {
            "list" => "LIST".to_owned(),
            "help" => return Typed::Help,
            "quit" => return Typed::Quit,
            _ => return Typed::Mistake(format!("there is no command /{command}; try /help")),
        },
    };
    match request.len() {
        0..=MAX_REQUEST => Typed::Request(request),
        length => {
            let excess = length - MAX_REQUEST;
            Typed::Mistake(format!("that line is {excess} bytes too long and was not sent"))
        }
    }
}

// What arrives

/// A line of the server as a person reads it; `None` where there is nothing to show. Lines with an
/// unknown keyword are ignored (PROTOCOL.md, "Versioning").
fn show(line: &str, roster: &mut Roster) -> Option<String> {
    let (keyword, rest) = line.split_once(' ').unwrap_or((line, ""));
    let (first, text) = rest.split_once(' ').unwrap_or((rest, ""));
    match keyword {
        "MSG" => Some(format!("{first}: {text}")),
        "PRIV" => Some(format!("[private] {first}: {text}")),
        "SENT" => Some(format!("[private to {first}] {text}")),
        "JOINED" => Some(format!("{first} joined the chat.")),
        "LEFT" => Some(format!("{first} left the chat.")),
        "USERS" => roster.add(first, text),
        "ERR" => Some(format!("Error: {text}")),
        "HELP" => Some(rest.to_owned()),
        _ => None,
    }
}

/// Collects a roster that comes on several lines (PROTOCOL.md, "Roster").
#[derive(Default)]
struct Roster {
    names: Vec<String>,
}

impl Roster {
    /// Returns what to show once the last name has come.
    fn add(&mut self, count: &str, names: &str) -> Option<String> {
        self.names.extend(names.split(' ').map(str::to_owned));
        if count.parse().is_ok_and(|count: usize| self.names.len() < count) {
            return None;
        }
        let names = std::mem::take(&mut self.names).join(", ");
        Some(format!("Users online ({count}): {names}"))
    }
}

/// A line of the server as text without anything that a terminal would obey.
fn printable(bytes: &[u8]) -> String {
    let mut text = String::new();
    for character in String::from_utf8_lossy(bytes).chars() {
        match character {
            '\t' => text.push('\t'),
            '\u{2028}' | '\u{2029}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => {
                text.extend(character.escape_unicode())
            }
            _ if character.is_control() => text.extend(character.escape_default()),
            _ => text.push(character),
        }
    }
    text
}

// The conversation

/// What the main thread waits for.
enum Event {
    Arrived(String),
    ServerGone(String),
    Typed(String),
    EndOfInput,
}

fn listen_to_server(socket: TcpStream, events: &Sender<Event>) {
    let mut socket = BufReader::new(socket);
    let gone = loop {
        let mut line = Vec::new();
        match (&mut socket).take(MAX_LINE).read_until(b'\n', &mut line) {
            Err(error) => break error.to_string(),
            Ok(_) if line.ends_with(b"\n") => {
                line.pop();
                if line.last() == Some(&b'\r') {
                    line.pop();
                }
                if events.send(Event::Arrived(printable(&line))).is_err() {
                    return;
                }
            }
            Ok(length) if length as u64 == MAX_LINE => break "it sent a line too long".to_owned(),
            Ok(_) => break "it closed the connection".to_owned(),
        }
    };
    let _ = events.send(Event::ServerGone(gone));
}

fn listen_to_person(events: &Sender<Event>) {
    let mut input = io::stdin().lock();
    let mut line = Vec::new();
    while matches!(input.read_until(b'\n', &mut line), Ok(1..)) {
        let text = String::from_utf8_lossy(&line);
        if events.send(Event::Typed(text.trim_end_matches(['\r', '\n']).to_owned())).is_err() {
            return;
        }
        line.clear();
    }
    let _ = events.send(Event::EndOfInput);
}

/// Where the conversation stands.
#[derive(PartialEq, Eq)]
enum Stage {
    /// Nothing has come from the server yet.
    Greeting,
    /// A name is to be typed.
    Asking,
    /// A name was sent.
    Naming,
    Talking,
    /// QUIT was sent; the server's BYE is awaited.
    Leaving,
}

struct Client {
    socket: TcpStream,
    address: String,
    stage: Stage,
    /// The name from the command line.
    name: Option<String>,
    /// Typed before it could be sent.
    waiting: Vec<String>,
    input_has_ended: bool,
    roster: Roster,
}

impl Client {
    /// Talks until the end. An error is one sentence for standard error.
    fn run(&mut self, events: &Receiver<Event>) -> Result<(), String> {
        for event in events {
            match event {
                Event::Arrived(line) if line.starts_with("BYE") && self.stage == Stage::Leaving => {
                    return Ok(());
                }
                Event::Arrived(line) => self.arrived(&line)?,
                Event::ServerGone(reason) => {
                    return Err(format!("lost the server at {}: {reason}", self.address));
                }
                Event::Typed(line) => self.waiting.push(line),
                Event::EndOfInput => self.input_has_ended = true,
            }
            self.send_waiting()?;
        }
        Ok(())
    }

    fn arrived(&mut self, line: &str) -> Result<(), String> {
        let keyword = line.split(' ').next().unwrap_or_default();
        match (&self.stage, keyword) {
            (Stage::Greeting, _) if line.starts_with("HELLO linechat/1") => {
                self.stage = Stage::Asking;
                if let Some(name) = self.name.clone() {
                    self.stage = Stage::Naming;
                    return self.send(&format!("NAME {name}"));
                }
                self.print("Your name:")
            }
            (Stage::Greeting, "ERR") | (_, "BYE") => {
                let text = show(line, &mut self.roster).unwrap_or(line.to_owned());
                Err(format!("{} closed the connection: {text}", self.address))
            }
            (Stage::Greeting, _) => Err(format!("{} does not speak linechat/1", self.address)),
            (Stage::Naming, "WELCOME") => {
                self.stage = Stage::Talking;
                Ok(())
            }
            (Stage::Naming, "ERR") => {
                let text = show(line, &mut self.roster).unwrap_or_default();
                if self.name.is_some() && !io::stdin().is_terminal() {
                    return Err(text);
                }
                self.stage = Stage::Asking;
                self.print(&text)?;
                self.print("Your name:")
            }
            _ => match show(line, &mut self.roster) {
                Some(text) => self.print(&text),
                None => Ok(()),
            },
        }
    }

    /// Sends what has been typed, as far as the stage allows.
    fn send_waiting(&mut self) -> Result<(), String> {
        while matches!(self.stage, Stage::Asking | Stage::Talking) {
            if self.waiting.is_empty() {
                if self.input_has_ended {
                    self.stage = Stage::Leaving;
                    self.send("QUIT")?;
                }
                break;
            }
            let line = self.waiting.remove(0);
            match understand(&line) {
                Typed::Quit => {
                    self.stage = Stage::Leaving;
                    self.send("QUIT")?;
                }
                Typed::Help => self.print(HELP)?,
                Typed::Nothing => {}
                _ if self.stage == Stage::Asking => {
                    self.stage = Stage::Naming;
                    self.send(&format!("NAME {}", line.trim()))?;
                }
                Typed::Request(request) => self.send(&request)?,
                Typed::Mistake(text) => self.print(&text)?,
            }
        }
        Ok(())
    }

    fn send(&mut self, request: &str) -> Result<(), String> {
        let sent = self.socket.write_all(format!("{request}\n").as_bytes());
        sent.map_err(|error| format!("lost the server at {}: {error}", self.address))
    }

    fn print(&mut self, text: &str) -> Result<(), String> {
        let shown = writeln!(io::stdout(), "{text}");
        shown.map_err(|error| format!("cannot write to standard output: {error}"))
    }
}

// The command line

const USAGE: &str = "\
Usage: linechat-client [HOST[:PORT]] [NAME]

Joins the linechat room at HOST (default: localhost, port 9999). /help lists what can be typed.
";

/// `HOST`, `HOST:PORT`, `[IPV6]:PORT` or a bare IPv6 address, completed by the default port.
fn with_port(host: &str) -> String {
    let is_bare_ipv6 = host.matches(':').count() > 1 && !host.starts_with('[');
    match host.rsplit_once(':') {
        _ if is_bare_ipv6 => format!("[{host}]:{DEFAULT_PORT}"),
        Some((_, port)) if !port.ends_with(']') => host.to_owned(),
        _ => format!("{host}:{DEFAULT_PORT}"),
    }
}

fn chat(host: &str, name: Option<String>) -> Result<(), String> {
    let address = with_port(host);
    let cannot = |error: io::Error| format!("cannot connect to {address}: {error}");
    let socket = TcpStream::connect(&address).map_err(cannot)?;
    socket.set_nodelay(true).map_err(cannot)?;
    let listening = socket.try_clone().map_err(cannot)?;
    let (events, received) = mpsc::channel();
    let typed = events.clone();
    thread::spawn(move || listen_to_server(listening, &events));
    thread::spawn(move || listen_to_person(&typed));
    let mut client = Client {
        socket,
        address,
        stage: Stage::Greeting,
        name,
        waiting: Vec::new(),
        input_has_ended: false,
        roster: Roster::default(),
    };
    let result = client.run(&received);
    let _ = client.socket.shutdown(Shutdown::Both);
    result
}

fn main() -> ExitCode {
    let complain = |text: &str| drop(writeln!(io::stderr(), "linechat-client: {text}"));
    let arguments = std::env::args_os().skip(1).map(|word| word.to_string_lossy().into_owned());
    let arguments: Vec<String> = arguments.collect();
    let (host, name) = match arguments.as_slice() {
        [option] if option == "--help" || option == "-h" => {
            let shown = io::stdout().write_all(USAGE.as_bytes());
            return if shown.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE };
        }
        [word, ..] if word.starts_with('-') => {
            complain(&format!("there is no option {word}; try --help"));
            return ExitCode::from(2);
        }
        [] => (DEFAULT_HOST, None),
        [host] => (host.as_str(), None),
        [host, name] => (host.as_str(), Some(name.clone())),
        _ => {
            complain("give a host and a name, nothing more; try --help");
            return ExitCode::from(2);
        }
    };
    match chat(host, name) {
        Ok(()) => ExitCode::SUCCESS,
        Err(text) => {
            complain(&text);
            ExitCode::FAILURE
        }
    }
}
