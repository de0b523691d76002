//! Those who talk to the server: over a socket, or through a program (nc, telnet, linechat-client).

use crate::process::Printed;
use crate::terminal::Terminal;
use crate::text::{show, side_by_side};
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// Waiting for something is done in slices of this, between which it is seen whether the run is over.
pub const SLICE: Duration = Duration::from_millis(20);

/// More than a right server ever owes to one client of a transcript, in bytes.
const TOO_MUCH: usize = 16 * 1024 * 1024;

/// After this long without being able to send a byte, the rest is not sent.
const UNSENT: Duration = Duration::from_secs(4);

/// Bytes that are sent, one in each slice, to see whether the connection is still there.
const SENT_TO_BE_HEARD: usize = 20;

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

/// A real program: what is written to it is typed, what it prints is received.
pub struct Program {
    pub child: Child,
    typed: Option<ChildStdin>,
    printed: Printed,
    pub complaints: Printed,
    /// From standard error, not yet looked for in the transcript.
    pub complained: Vec<u8>,
    pub terminal: Option<Terminal>,
}

/// How a client's bytes travel.
pub enum Line {
    Socket(TcpStream),
    Program(Box<Program>),
}

/// Why a client is here.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// The transcript tells what it does and receives.
    Cast,
    /// linechat-client, or the suite where that is the server: neither passes a fence.
    Ours,
    /// Connected without a name, and receives nothing but what it asks for.
    Bystander,
    /// In the room, says nothing, and receives nothing but what is public.
    Spectator,
}

/// Bytes that are taken from the front, however many there are.
#[derive(Default)]
pub struct Received {
    bytes: Vec<u8>,
    taken: usize,
}

impl Received {
    pub fn extend(&mut self, bytes: &[u8]) {
        self.bytes.drain(..std::mem::take(&mut self.taken));
        self.bytes.extend(bytes);
    }

    pub fn take(&mut self, length: usize) -> Vec<u8> {
        let start = self.taken;
        self.taken = (start + length).min(self.bytes.len());
        self.bytes[start..self.taken].to_vec()
    }

    /// Takes something out of the middle.
    pub fn cut(&mut self, start: usize, end: usize) -> Vec<u8> {
        self.bytes.drain(self.taken + start..self.taken + end).collect()
    }

    pub fn truncate(&mut self, length: usize) {
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
    pub part: Part,
    pub line: Line,
    /// Not yet looked for in the transcript.
    pub received: Received,
    /// What the transcript has seen.
    pub history: Vec<Vec<u8>>,
    pub is_closed: bool,
    /// A reset has ended it, which can destroy what was on its way.
    pub is_reset: bool,
    pub has_half_closed: bool,
    pub is_stalled: bool,
    /// The transcript says that the server ends the connection.
    pub was_to_close: bool,
    /// What was sent last is not a whole line.
    pub is_mid_line: bool,
    /// Has sent something since its last fence.
    pub is_unfenced: bool,
    /// Lines that it has sent since then.
    pub lines_unfenced: usize,
    /// When it last sent something.
    pub last_sent: Instant,
    /// How many LEFT may come that nobody's request causes.
    pub awaited_leaves: usize,
    /// What ends a line as it is received: telnet and linechat-client show them ended by LF.
    pub ending: &'static str,
}

impl Client {
    pub fn new(name: &str, part: Part, line: Line, ending: &'static str) -> Client {
        Client {
            name: name.to_owned(),
            part,
            line,
            received: Received::default(),
            history: Vec::new(),
            is_closed: false,
            is_reset: false,
            has_half_closed: false,
            is_stalled: false,
            was_to_close: false,
            is_mid_line: false,
            is_unfenced: false,
            lines_unfenced: 0,
            last_sent: Instant::now(),
            awaited_leaves: 0,
            ending,
        }
    }

    pub fn program(&mut self) -> Result<&mut Program, String> {
        match &mut self.line {
            Line::Program(program) => Ok(program),
            Line::Socket(_) => Err(format!("{} is not a program", self.name)),
        }
    }

    pub fn terminal(&mut self) -> Result<&mut Terminal, String> {
        self.program()?.terminal.as_mut().ok_or("there is no terminal".to_owned())
    }

    /// Where a socket's connection comes from.
    pub fn address(&self) -> Option<SocketAddr> {
        match &self.line {
            Line::Socket(socket) => socket.local_addr().ok(),
            Line::Program(_) => None,
        }
    }

    /// Sends all of it, and takes what comes meanwhile when the server waits for that.
    pub fn send(&mut self, bytes: &[u8]) {
        let sent = match &mut self.line {
            Line::Socket(_) => {
                let sent = self.send_to_socket(bytes);
                self.is_reset |= sent.as_ref().is_err_and(|error| !is_late(error));
                sent
            }
            Line::Program(program) => match &mut program.typed {
                Some(typed) => typed.write_all(bytes),
                None => Ok(()),
            },
        };
        // A server that has closed shows in what is received, or is not.
        if sent.is_ok() {
            self.is_mid_line = bytes.last().is_some_and(|&last| last != b'\n');
            self.is_unfenced = true;
            self.last_sent = Instant::now();
            self.lines_unfenced += bytes.iter().filter(|&&byte| byte == b'\n').count();
        }
    }

    fn send_to_socket(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        let mut since = Instant::now();
        while let (Line::Socket(socket), false) = (&mut self.line, bytes.is_empty()) {
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

    /// Whether the connection is still there: of what is sent, the first that is not heard any more
    /// is answered with a reset.
    pub fn is_heard(&mut self) -> Result<bool, String> {
        let Line::Socket(socket) = &mut self.line else {
            return Err(format!("{} is not a socket", self.name));
        };
        for _ in 0..SENT_TO_BE_HEARD {
            if socket.write_all(b"\n").is_err() {
                return Ok(false);
            }
            thread::sleep(SLICE);
        }
        Ok(true)
    }

    pub fn end_input(&mut self) {
        match &mut self.line {
            Line::Socket(socket) => drop(socket.shutdown(Shutdown::Write)),
            Line::Program(program) => program.typed = None,
        }
        self.has_half_closed = true;
    }

    /// Receives something more, or the end. Returns false when the time is over.
    pub fn read(&mut self, patience: Duration) -> bool {
        if self.is_closed || self.received.len() > TOO_MUCH {
            return false;
        }
        let read = match &mut self.line {
            Line::Socket(socket) => read_socket(socket, &mut self.received, patience),
            Line::Program(program) => program.read(&mut self.received, patience),
        };
        match read {
            Ok(true) => true,
            Err(error) if is_late(&error) => false,
            Ok(false) | Err(_) => {
                self.is_closed = true;
                self.is_reset |= read.is_err();
                self.forget_farewell();
                true
            }
        }
    }

    /// What telnet says for itself at the end.
    fn forget_farewell(&mut self) {
        let farewell = b"Connection closed by foreign host.\n";
        if let (Line::Program(_), true) = (&self.line, self.received.ends_with(farewell)) {
            let length = self.received.len() - farewell.len();
            self.received.truncate(length);
        }
    }

    /// Takes a whole line from what has been received.
    pub fn take_line(&mut self) -> Option<Vec<u8>> {
        let end = self.received.iter().position(|&byte| byte == b'\n')?;
        Some(self.received.take(end + 1))
    }

    /// A line without what must end it. What lacks that is left as it is and matches nothing.
    pub fn without_ending<'a>(&self, line: &'a [u8]) -> &'a [u8] {
        line.strip_suffix(self.ending.as_bytes()).unwrap_or(line)
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
        let settings = terminal.settings.clone();
        let last = format!("{settings}\n");
        match self.received.strip_suffix(last.as_bytes()).map(<[u8]>::len) {
            Some(length) => {
                self.received.truncate(length);
                Ok(())
            }
            None => Err(side_by_side(&settings, &self.unread())),
        }
    }
}

/// Connects to a server.
pub fn socket(address: &str) -> Result<Line, String> {
    let socket = TcpStream::connect(address).and_then(|socket| {
        socket.set_nodelay(true)?;
        socket.set_write_timeout(Some(SLICE))?;
        Ok(socket)
    });
    socket.map(Line::Socket).map_err(|error| format!("cannot connect to {address}: {error}"))
}

/// Nothing could be received or sent in time, or in less: a socket with a time-out does not go on by
/// itself after a signal (signal(7)).
pub fn is_late(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted)
}

fn read_socket(
    socket: &mut TcpStream,
    into: &mut Received,
    patience: Duration,
) -> io::Result<bool> {
    let mut buffer = [0; 16 * 1024];
    socket.set_read_timeout(Some(patience))?;
    let length = socket.read(&mut buffer)?;
    into.extend(&buffer[..length]);
    Ok(length > 0)
}

/// One who floods has threads of its own with this connection.
impl Drop for Client {
    fn drop(&mut self) {
        if let (Line::Socket(socket), true) = (&self.line, self.is_stalled) {
            let _ = socket.shutdown(Shutdown::Both);
        }
    }
}

impl Program {
    pub fn start(command: &mut Command) -> Result<Line, String> {
        let spawned =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
        let mut child = spawned.map_err(|error| format!("cannot start {command:?}: {error}"))?;
        Ok(Line::Program(Box::new(Program {
            typed: child.stdin.take(),
            printed: Printed::by(child.stdout.take()),
            complaints: Printed::by(child.stderr.take()),
            complained: Vec::new(),
            terminal: None,
            child,
        })))
    }

    fn read(&mut self, into: &mut Received, patience: Duration) -> io::Result<bool> {
        let mut bytes = Vec::new();
        let read = self.printed.read(&mut bytes, patience);
        match &mut self.terminal {
            None => into.extend(&bytes),
            Some(terminal) => into.extend(&terminal.screen.print(&bytes)),
        }
        read
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // script(1) ends with the program that it has started, or, save where that is a shell's,
        // ends it if it is asked to, which SIGKILL does not.
        let ended = self.child.try_wait().is_ok_and(|status| status.is_some());
        let ours = self.terminal.as_ref().and_then(|terminal| terminal.process);
        let (process, signal) = ours.map_or((self.child.id(), "TERM"), |ours| (ours, "KILL"));
        if !ended && crate::process::signal(process, signal).is_err() {
            let _ = self.child.kill();
        }
        let _ = self.child.wait();
    }
}

/// nc as a client, which ends its side of the connection when what is typed ends.
pub fn nc(host: &str, port: &str) -> Result<Line, String> {
    Program::start(Command::new("nc").args(["-N", host, port]))
}

/// telnet wants a terminal to type at, and makes it echo; what it prints comes through a descriptor
/// of its own. It takes bytes of UTF-8 for the terminal's special characters, whose eighth bit it
/// ignores, so there are none here.
pub fn telnet(host: &str, port: &str) -> Result<Line, String> {
    let special = "intr quit erase kill eof eol susp start stop lnext werase rprnt discard";
    let special: String = special.split(' ').map(|name| format!("{name} 255 ")).collect();
    let telnet = format!("stty raw {special}; exec telnet -E {host} {port} >&3");
    Program::start(
        Command::new("sh").arg("-c").arg(format!(
            "exec 3>&1; exec script --quiet --command '{telnet}' /dev/null >/dev/null"
        )),
    )
}
