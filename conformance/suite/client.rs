//! One client: a socket, or a program, and what it has received.

use crate::process::{self, Printed};
use crate::screen::Screen;
use crate::text::{show, side_by_side};
use std::collections::VecDeque;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// Every wait is done in slices of this, between which it is checked whether the run is over.
pub const SLICE: Duration = Duration::from_millis(20);
/// More than a right server ever sends to one client in one step, in bytes.
const TOO_MUCH: usize = 16 * 1024 * 1024;
/// If nothing can be sent for this long, the rest is not sent.
const UNSENT: Duration = Duration::from_secs(4);

/// A program that stands between a socket of the suite and the server.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Via {
    Nc,
    Telnet,
}

impl Via {
    /// Connects by the program. The processes must be ended with the connection.
    pub fn connect(self, address: &str, processes: &mut Vec<Child>) -> io::Result<TcpStream> {
        let (host, port) = address.rsplit_once(':').unwrap_or((address, ""));
        let start = |command: &mut Command, input| {
            command.stdin(input).stdout(Stdio::piped()).stderr(Stdio::null()).spawn()
        };
        // telnet wants a terminal to type at, and makes it echo; what it prints comes through a
        // descriptor of its own. It takes bytes of UTF-8 for the terminal's special characters, whose
        // eighth bit it ignores, so there are none here.
        let special = "intr quit erase kill eof eol susp start stop lnext werase rprnt discard";
        let special: String = special.split(' ').map(|name| format!("{name} 255 ")).collect();
        let command = match self {
            Via::Nc => format!("exec nc -N {host} {port}"),
            Via::Telnet => format!(
                "exec 3>&1; exec script --quiet --command \
                 'stty raw {special}; exec telnet -E {host} {port} >&3' /dev/null >/dev/null"
            ),
        };
        let mut program = start(Command::new("sh").args(["-c", &command]), Stdio::piped())?;
        let (typed, mut shown) = (program.stdin.take(), program.stdout.take());
        processes.push(program);
        if self == Via::Telnet {
            // What telnet says for itself is removed, and CR put back, which it does not show.
            let filter = "1,/^Escape character/d; /^Connection closed by foreign/d; s/$/\\r/";
            let input = shown.map_or(Stdio::null(), Stdio::from);
            let mut filter = start(Command::new("sed").args(["--unbuffered", filter]), input)?;
            shown = filter.stdout.take();
            processes.push(filter);
        }
        let (near, far) = pair()?;
        let answers = far.try_clone()?;
        thread::spawn(move || typed.map(|typed| carry(far, typed, <[u8]>::to_vec)));
        thread::spawn(move || {
            let _ = shown.map(|shown| carry(shown, &answers, <[u8]>::to_vec));
            answers.shutdown(Shutdown::Write)
        });
        Ok(near)
    }
}

/// Sends on what comes, changed, until either end closes. io::copy may keep it until there is more.
pub fn carry(mut from: impl Read, mut to: impl Write, change: impl Fn(&[u8]) -> Vec<u8>) {
    let mut buffer = [0; 16 * 1024];
    while let Ok(length @ 1..) = from.read(&mut buffer) {
        if to.write_all(&change(&buffer[..length])).is_err() {
            break;
        }
    }
}

/// Both ends of a connection.
pub fn pair() -> io::Result<(TcpStream, TcpStream)> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let near = connect(listener.local_addr()?)?;
    let (far, _) = listener.accept()?;
    far.set_nodelay(true)?;
    Ok((near, far))
}

/// Connects to HOST:PORT.
pub fn connect(address: impl std::net::ToSocketAddrs) -> io::Result<TcpStream> {
    let socket = TcpStream::connect(address)?;
    socket.set_nodelay(true)?;
    socket.set_write_timeout(Some(SLICE))?;
    Ok(socket)
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

/// linechat-client: what is written to it is typed, what it prints is received.
pub struct Program {
    pub child: Child,
    typed: Option<ChildStdin>,
    printed: Printed,
    pub complaints: Printed,
    pub terminal: Option<Terminal>,
}

pub enum Transport {
    Socket(TcpStream),
    Program(Box<Program>),
}

pub struct Client {
    pub name: String,
    pub transport: Transport,
    /// It is linechat-client, or the suite where that is the server: neither passes a fence.
    pub is_ours: bool,
    /// What is not yet compared with the transcript.
    received: VecDeque<u8>,
    /// Something has ever come.
    is_greeted: bool,
    pub is_closed: bool,
    /// A reset has ended the connection, which can destroy what was on its way.
    pub is_reset: bool,
    pub has_half_closed: bool,
    /// It reads nothing, a thread of its own reads, or its end has been looked for: it passes no
    /// fence, and nothing is asserted when the transcript ends.
    pub is_exempt: bool,
    is_mid_line: bool,
    /// It has sent something since its last fence.
    pub owes_fence: bool,
    /// nc, or telnet and its filter, which stand between the socket and the server.
    pub processes: Vec<Child>,
}

impl Client {
    pub fn new(name: &str, transport: Transport, is_ours: bool) -> Client {
        Client {
            name: name.to_owned(),
            transport,
            is_ours,
            received: VecDeque::new(),
            is_greeted: false,
            is_closed: false,
            is_reset: false,
            has_half_closed: false,
            is_exempt: false,
            is_mid_line: false,
            owes_fence: false,
            processes: Vec::new(),
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
            Transport::Socket(_) => self.send_to_socket(bytes),
            Transport::Program(program) => match &mut program.typed {
                Some(typed) => typed.write_all(bytes),
                None => Ok(()),
            },
        };
        // A server that has closed shows in what is received, or is not.
        match sent {
            Ok(()) => {
                self.is_mid_line = bytes.last().is_some_and(|&last| last != b'\n');
                self.owes_fence = true;
            }
            Err(error) => self.is_reset |= !is_late(&error),
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
                Err(_) if self.is_exempt => {}
                Err(_) => while self.read(Duration::from_millis(1)) {},
            }
        }
        Ok(())
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
            Transport::Socket(socket) => read_socket(socket, timeout),
            Transport::Program(program) => program.read(timeout),
        };
        match read {
            Err(error) if is_late(&error) => return false,
            Ok(Some(bytes)) => {
                self.is_greeted = true;
                self.received.extend(bytes);
                self.received.make_contiguous();
            }
            Ok(None) | Err(_) => {
                self.is_closed = true;
                self.is_reset |= read.is_err();
            }
        }
        true
    }

    /// What has been received and not yet compared.
    pub fn received(&self) -> &[u8] {
        self.received.as_slices().0
    }

    pub fn take(&mut self, length: usize) -> Vec<u8> {
        self.received.drain(..length).collect()
    }

    /// Takes a whole line, with its ending.
    pub fn take_line(&mut self) -> Option<Vec<u8>> {
        let end = self.received().iter().position(|&byte| byte == b'\n')?;
        Some(self.take(end + 1))
    }

    /// A line without what must end it. A line that lacks it is left as it is and matches nothing.
    pub fn without_ending<'a>(&self, line: &'a [u8]) -> &'a [u8] {
        line.strip_suffix(self.ending()).unwrap_or(line)
    }

    /// linechat-client shows, and sends, LF for CR LF.
    fn ending(&self) -> &'static [u8] {
        if self.is_ours {
            b"\n"
        } else {
            b"\r\n"
        }
    }

    /// Tells what has been received and not yet compared.
    pub fn unread(&self) -> String {
        match self.received.len() {
            0 => "nothing".to_owned(),
            1..=TOO_MUCH => show(self.received()),
            _ => format!("garbage without end: {}", show(&self.received()[..1000])),
        }
    }

    /// The terminal must have its settings again, which a last line tells.
    pub fn check_settings(&mut self) -> Result<(), String> {
        let Ok(terminal) = self.terminal() else { return Ok(()) };
        let settings = format!("{}\n", terminal.settings);
        match self.received().strip_suffix(settings.as_bytes()).map(<[u8]>::len) {
            Some(length) => Ok(self.received.truncate(length)),
            None => Err(side_by_side(settings.trim_end(), &self.unread())),
        }
    }

    /// A client that has not been greeted sends nothing: the greeting must not wait for that.
    pub fn can_pass_fence(&self) -> bool {
        let is_silent = self.is_closed || self.has_half_closed || self.is_exempt;
        !(is_silent || !self.is_greeted || self.is_mid_line || self.is_ours)
    }

    /// Takes a PONG out of what has been received, from `searched` on. Returns where it stood; `None`
    /// if it has not come yet.
    pub fn take_pong(&mut self, pong: &str, searched: &mut usize) -> Option<usize> {
        let line = [pong.as_bytes(), self.ending()].concat();
        let mut windows = self.received()[*searched..].windows(line.len());
        let found = windows.position(|window| window == line).map(|found| found + *searched);
        *searched = self.received.len().saturating_sub(line.len());
        self.received.drain(found?..found? + line.len());
        self.received.make_contiguous();
        self.owes_fence = false;
        found
    }
}

/// Nothing could be received or sent in time. A signal interrupts a socket with a time-out
/// (signal(7)).
fn is_late(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted)
}

/// Returns `None` at the end.
fn read_socket(socket: &mut TcpStream, timeout: Duration) -> io::Result<Option<Vec<u8>>> {
    let mut buffer = [0; 16 * 1024];
    socket.set_read_timeout(Some(timeout))?;
    let length = socket.read(&mut buffer)?;
    Ok((length > 0).then(|| buffer[..length].to_vec()))
}

/// Closing the socket alone could end the connection later: the thread of a client that floods holds
/// the socket too, and so does a program that is just being started, until its exec(2).
impl Drop for Client {
    fn drop(&mut self) {
        if let Transport::Socket(socket) = &self.transport {
            let _ = socket.shutdown(Shutdown::Both);
        }
        for process in &mut self.processes {
            // script(1) then ends telnet, too, which SIGKILL would not do.
            let _ = process::signal(process.id(), "TERM");
            let _ = process.wait();
        }
    }
}

impl Program {
    /// Starts linechat-client, at a terminal if it has columns. Words like `LANG=pt` before its
    /// arguments are for its environment.
    pub fn start(arguments: &str, columns: Option<usize>) -> Result<Transport, String> {
        let client = env!("CARGO_BIN_EXE_linechat-client");
        let mut words: Vec<_> = arguments.split_whitespace().collect();
        let is_variable = |word: &&str| !word.starts_with('-') && word.contains('=');
        let variables = words.iter().take_while(|word| is_variable(word)).count();
        let variables = words.drain(..variables).filter_map(|word| word.split_once('='));
        let mut command = Command::new(if columns.is_some() { "script" } else { client });
        command.env_remove("NO_COLOR").envs([("TERM", "xterm"), ("LC_ALL", "")]).envs(variables);
        match columns {
            None => command.args(words),
            Some(columns) => command.env("SHELL", "/bin/sh").args([
                "--quiet",
                "--return",
                "--command",
                &format!(
                    "stty columns {columns} rows 24; tty; stty -g; \
                     sh -c 'echo $$; exec {client} {}'; status=$?; stty -g; exit $status",
                    words.join(" ")
                ),
                "/dev/null",
            ]),
        };
        let command = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child =
            command.spawn().map_err(|error| format!("cannot start {command:?}: {error}"))?;
        Ok(Transport::Program(Box::new(Program {
            typed: child.stdin.take(),
            printed: Printed::by(child.stdout.take()),
            complaints: Printed::by(child.stderr.take()),
            terminal: None,
            child,
        })))
    }

    /// Returns `None` at the end.
    fn read(&mut self, timeout: Duration) -> io::Result<Option<Vec<u8>>> {
        let has_come = self.printed.more(timeout)?;
        let bytes = std::mem::take(&mut self.printed.unread);
        Ok(has_come.then(|| match &mut self.terminal {
            None => bytes,
            Some(terminal) => terminal.screen.print(&bytes),
        }))
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
