//! One client: a socket, or a program (nc, telnet, linechat-client), and what it has received. What
//! the server owes to it by order alone, its fences, are at the end.

use crate::process::{self, Printed};
use crate::screen::Screen;
use crate::text::{show, side_by_side};
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// Every wait is done in slices of this, between which it is checked whether the run is over.
pub const SLICE: Duration = Duration::from_millis(20);
/// More than a right server ever sends to one client in one step, in bytes.
const TOO_MUCH: usize = 16 * 1024 * 1024;
/// If nothing can be sent for this long, the rest is not sent.
const UNSENT: Duration = Duration::from_secs(4);
/// Bytes sent, one in each slice, to see whether the connection is still there.
const SENT_TO_BE_HEARD: usize = 20;
/// How many of its last lines a client remembers.
const HISTORY: usize = 6;

/// What the transcript's clients are.
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

/// A terminal that linechat-client runs at: script(1) holds it, and `screen` shows it.
pub struct Terminal {
    pub screen: Screen,
    /// Its file, with which its size is set.
    pub path: String,
    /// Its settings before the client took it over, which it must have again in the end.
    pub settings: String,
    /// The process id of linechat-client.
    pub process: Option<u32>,
}

/// A real program: what is written to it is typed, what it prints is received.
pub struct Program {
    pub child: Child,
    typed: Option<ChildStdin>,
    printed: Printed,
    pub complaints: Printed,
    /// From standard error, not yet compared.
    pub complained: Vec<u8>,
    pub terminal: Option<Terminal>,
}

pub enum Transport {
    Socket(TcpStream),
    Program(Box<Program>),
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The transcript says what it sends and receives.
    Scripted,
    /// linechat-client, or the suite where that is the server: neither passes a fence.
    Ours,
    /// Connected without a name; it receives only what it asks for.
    Bystander,
}

/// Bytes that are taken from the front, however many there are.
#[derive(Default)]
pub struct Received {
    bytes: Vec<u8>,
    taken: usize,
}

impl Received {
    fn extend(&mut self, bytes: &[u8]) {
        self.bytes.drain(..std::mem::take(&mut self.taken));
        self.bytes.extend(bytes);
    }

    pub fn take(&mut self, length: usize) -> Vec<u8> {
        let start = self.taken;
        self.taken = (start + length).min(self.bytes.len());
        self.bytes[start..self.taken].to_vec()
    }

    fn cut(&mut self, start: usize, end: usize) -> Vec<u8> {
        self.bytes.drain(self.taken + start..self.taken + end).collect()
    }

    fn truncate(&mut self, length: usize) {
        self.bytes.truncate(self.taken + length);
    }
}

impl std::ops::Deref for Received {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes[self.taken..]
    }
}

pub struct Client {
    pub name: String,
    pub kind: Kind,
    pub transport: Transport,
    /// Not yet compared with the transcript.
    pub received: Received,
    /// The last lines that were compared.
    pub history: Vec<Vec<u8>>,
    pub is_closed: bool,
    /// A reset has ended the connection, which can destroy what was on its way.
    pub is_reset: bool,
    pub has_half_closed: bool,
    /// It reads nothing, or a thread of its own reads; nothing is asserted at its end.
    pub is_stalled: bool,
    /// The transcript says that the server ends the connection.
    pub was_to_close: bool,
    pub is_mid_line: bool,
    /// Lines sent since its last fence; `None` if nothing was sent.
    pub unfenced: Option<usize>,
    pub last_sent: Instant,
    /// How many LEFT may come that no request causes.
    pub awaited_leaves: usize,
    /// Ends each received line: telnet and linechat-client show LF for CR LF.
    ending: &'static str,
}

impl Client {
    pub fn new(name: &str, kind: Kind, transport: Transport, ending: &'static str) -> Client {
        Client {
            name: name.to_owned(),
            kind,
            transport,
            received: Received::default(),
            history: Vec::new(),
            is_closed: false,
            is_reset: false,
            has_half_closed: false,
            is_stalled: false,
            was_to_close: false,
            is_mid_line: false,
            unfenced: None,
            last_sent: Instant::now(),
            awaited_leaves: 0,
            ending,
        }
    }

    pub fn program(&mut self) -> Result<&mut Program, String> {
        match &mut self.transport {
            Transport::Program(program) => Ok(program),
            Transport::Socket(_) => Err(format!("{} is not a program", self.name)),
        }
    }

    pub fn terminal(&mut self) -> Result<&mut Terminal, String> {
        self.program()?.terminal.as_mut().ok_or("there is no terminal".to_owned())
    }

    pub fn socket(&mut self) -> Result<&mut TcpStream, String> {
        match &mut self.transport {
            Transport::Socket(socket) => Ok(socket),
            Transport::Program(_) => Err(format!("{} is not a socket", self.name)),
        }
    }

    /// Sends all of it. If the server waits until its output is read, that is read.
    pub fn send(&mut self, bytes: &[u8]) {
        let sent = match &mut self.transport {
            Transport::Socket(_) => {
                let sent = self.send_to_socket(bytes);
                self.is_reset |= sent.as_ref().is_err_and(|error| !is_late(error));
                sent
            }
            Transport::Program(program) => match &mut program.typed {
                Some(typed) => typed.write_all(bytes),
                None => Ok(()),
            },
        };
        // A server that has closed shows in what is received, or is not.
        if sent.is_ok() {
            let lines = bytes.iter().filter(|&&byte| byte == b'\n').count();
            self.is_mid_line = bytes.last().is_some_and(|&last| last != b'\n');
            self.unfenced = Some(self.unfenced.unwrap_or(0) + lines);
            self.last_sent = Instant::now();
        }
    }

    fn send_to_socket(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        let mut since = Instant::now();
        while let (Transport::Socket(socket), false) = (&mut self.transport, bytes.is_empty()) {
            match socket.write(bytes) {
                Ok(length) => {
                    bytes = &bytes[length..];
                    since = Instant::now();
                }
                Err(error) if since.elapsed() > UNSENT || !is_late(&error) => return Err(error),
                Err(_) if self.is_stalled => {}
                Err(_) => while self.read(Duration::from_millis(1)) {},
            }
        }
        Ok(())
    }

    /// Returns whether the connection is still there: a connection that is no more answers with a
    /// reset.
    pub fn is_heard(&mut self) -> Result<bool, String> {
        let socket = self.socket()?;
        for _ in 0..SENT_TO_BE_HEARD {
            if socket.write_all(b"\n").is_err() {
                return Ok(false);
            }
            thread::sleep(SLICE);
        }
        Ok(true)
    }

    pub fn end_input(&mut self) {
        match &mut self.transport {
            Transport::Socket(socket) => drop(socket.shutdown(Shutdown::Write)),
            Transport::Program(program) => program.typed = None,
        }
        self.has_half_closed = true;
    }

    /// Receives something more, or the end. Returns false if neither comes in time.
    pub fn read(&mut self, timeout: Duration) -> bool {
        if self.is_closed || self.received.len() > TOO_MUCH {
            return false;
        }
        let read = match &mut self.transport {
            Transport::Socket(socket) => read_socket(socket, &mut self.received, timeout),
            Transport::Program(program) => program.read(&mut self.received, timeout),
        };
        match read {
            Ok(true) => true,
            Err(error) if is_late(&error) => false,
            Ok(false) | Err(_) => {
                self.is_closed = true;
                self.is_reset |= read.is_err();
                // What telnet says for itself at the end.
                let farewell = b"Connection closed by foreign host.\n";
                if let Transport::Program(_) = self.transport {
                    self.take_off(farewell);
                }
                true
            }
        }
    }

    /// Removes `end` from the end of what has been received. Returns false if it is not there.
    fn take_off(&mut self, end: &[u8]) -> bool {
        let length = self.received.strip_suffix(end).map(<[u8]>::len);
        length.map(|length| self.received.truncate(length)).is_some()
    }

    /// Takes a whole line, with its ending.
    pub fn take_line(&mut self) -> Option<Vec<u8>> {
        let end = self.received.iter().position(|&byte| byte == b'\n')?;
        Some(self.received.take(end + 1))
    }

    /// A line without what must end it. A line that lacks it is left as it is and matches nothing.
    pub fn without_ending<'a>(&self, line: &'a [u8]) -> &'a [u8] {
        line.strip_suffix(self.ending.as_bytes()).unwrap_or(line)
    }

    pub fn remember(&mut self, line: &[u8]) {
        self.history.push(line.to_vec());
        if self.history.len() > HISTORY {
            self.history.remove(0);
        }
    }

    pub fn unread(&self) -> String {
        match self.received.len() > TOO_MUCH {
            true => format!("garbage without end: {}", show(&self.received)),
            false => show(&self.received),
        }
    }

    /// The terminal must have its settings again, which a last line tells.
    pub fn check_settings(&mut self) -> Result<(), String> {
        let Ok(terminal) = self.terminal() else { return Ok(()) };
        let settings = format!("{}\n", terminal.settings);
        match self.take_off(settings.as_bytes()) {
            true => Ok(()),
            false => Err(side_by_side(settings.trim_end(), &self.unread())),
        }
    }
}

/// Connects to a server.
pub fn socket(address: &str) -> Result<Transport, String> {
    let socket = TcpStream::connect(address).and_then(|socket| {
        socket.set_nodelay(true)?;
        socket.set_write_timeout(Some(SLICE))?;
        Ok(socket)
    });
    socket.map(Transport::Socket).map_err(|error| format!("cannot connect to {address}: {error}"))
}

/// Nothing could be received or sent in time. A signal interrupts a socket with a time-out
/// (signal(7)).
pub fn is_late(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted)
}

fn read_socket(socket: &mut TcpStream, into: &mut Received, timeout: Duration) -> io::Result<bool> {
    let mut buffer = [0; 16 * 1024];
    socket.set_read_timeout(Some(timeout))?;
    let length = socket.read(&mut buffer)?;
    into.extend(&buffer[..length]);
    Ok(length > 0)
}

/// Closing the socket alone could end the connection later: the thread of a client that floods holds
/// the socket too, and so does a program that is just being started, until its exec(2).
impl Drop for Client {
    fn drop(&mut self) {
        if let Transport::Socket(socket) = &self.transport {
            let _ = socket.shutdown(Shutdown::Both);
        }
    }
}

impl Program {
    pub fn start(command: &mut Command) -> Result<Transport, String> {
        let spawned =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
        let mut child = spawned.map_err(|error| format!("cannot start {command:?}: {error}"))?;
        Ok(Transport::Program(Box::new(Program {
            typed: child.stdin.take(),
            printed: Printed::by(child.stdout.take()),
            complaints: Printed::by(child.stderr.take()),
            complained: Vec::new(),
            terminal: None,
            child,
        })))
    }

    fn read(&mut self, into: &mut Received, timeout: Duration) -> io::Result<bool> {
        let mut bytes = Vec::new();
        let read = self.printed.read(&mut bytes, timeout);
        match &mut self.terminal {
            None => into.extend(&bytes),
            Some(terminal) => into.extend(&terminal.screen.print(&bytes)),
        }
        read
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // script(1) ends with the program that it has started, or, except where that is a shell's,
        // ends it if it receives SIGTERM; SIGKILL does not reach the program.
        let ended = self.child.try_wait().is_ok_and(|status| status.is_some());
        let ours = self.terminal.as_ref().and_then(|terminal| terminal.process);
        let (process, signal) = ours.map_or((self.child.id(), "TERM"), |ours| (ours, "KILL"));
        if !ended && process::signal(process, signal).is_err() {
            let _ = self.child.kill();
        }
        let _ = self.child.wait();
    }
}

/// nc as a client, which ends its side of the connection when what is typed ends.
pub fn nc(host: &str, port: &str) -> Result<Transport, String> {
    Program::start(Command::new("nc").args(["-N", host, port]))
}

/// telnet wants a terminal to type at, and makes it echo; what it prints comes through a descriptor
/// of its own. It takes bytes of UTF-8 for the terminal's special characters, whose eighth bit it
/// ignores, so there are none here.
pub fn telnet(host: &str, port: &str) -> Result<Transport, String> {
    let special = "intr quit erase kill eof eol susp start stop lnext werase rprnt discard";
    let special: String = special.split(' ').map(|name| format!("{name} 255 ")).collect();
    let telnet = format!("stty raw {special}; exec telnet -E {host} {port} >&3");
    Program::start(
        Command::new("sh").arg("-c").arg(format!(
            "exec 3>&1; exec script --quiet --command '{telnet}' /dev/null >/dev/null"
        )),
    )
}

/// Starts linechat-client, at a terminal if it has columns. Words like `LANG=pt` before its arguments
/// are for its environment.
pub fn linechat_client(arguments: &str, columns: Option<usize>) -> Result<Transport, String> {
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
    Program::start(&mut command)
}

/// Fences: a PING whose PONG is awaited.
impl Client {
    pub fn is_greeted(&self) -> bool {
        !self.received.is_empty() || !self.history.is_empty()
    }

    /// A client that has not been greeted sends nothing: the greeting must not wait for that.
    pub fn can_pass_fence(&self) -> bool {
        let is_silent = self.is_closed || self.has_half_closed || self.is_stalled;
        !(is_silent || !self.is_greeted() || self.is_mid_line || self.kind == Kind::Ours)
    }

    /// Takes the PONG out of what has been received, from `searched` on. Returns where it stood;
    /// `None` if it has not come yet.
    pub fn take_pong(
        &mut self,
        pong: &[u8],
        searched: &mut usize,
    ) -> Result<Option<usize>, String> {
        // Only whole lines are looked at; a telnet command may stand before one.
        let end = self.received.iter().rposition(|&byte| byte == b'\n').map_or(0, |at| at + 1);
        let from = *searched.min(&mut end.clone());
        let found = self.received[from..end].windows(pong.len()).position(|it| it == pong);
        *searched = end;
        let Some(found) = found.map(|found| found + from) else { return Ok(None) };
        let behind = &self.received[found + pong.len()..];
        let line_end = behind.iter().position(|&byte| byte == b'\n').unwrap_or(0);
        let line = self.received.cut(found, found + pong.len() + line_end + 1);
        self.unfenced = None;
        match self.without_ending(&line) == pong {
            true => Ok(Some(found)),
            false => Err(side_by_side(&show(pong), &show(&line))),
        }
    }
}
