//! One client: a socket, perhaps with a program at its other end, and what it has received.

use crate::process::{signal, Printed};
use crate::screen::Screen;
use crate::text::show;
use std::collections::VecDeque;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// Every wait is divided into these, and ends early if the run is over.
pub const SLICE: Duration = Duration::from_millis(20);
/// More than a right server ever sends to one client in one step, in bytes.
const TOO_MUCH: usize = 16 * 1024 * 1024;
/// If nothing can be sent for this long, the rest is not sent.
const UNSENT: Duration = Duration::from_secs(4);

/// Returns both ends of a connection.
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

/// Sends on what comes, changed, until either end closes. (io::copy may hold back what comes.)
pub fn carry(mut from: impl Read, mut to: impl Write, mut change: impl FnMut(&[u8]) -> Vec<u8>) {
    let mut buffer = [0; 16 * 1024];
    while let Ok(length @ 1..) = from.read(&mut buffer) {
        if to.write_all(&change(&buffer[..length])).is_err() {
            break;
        }
    }
}

/// A socket, and the programs at its other end.
pub type Transport = (TcpStream, Vec<Child>);

/// Starts a program, and a second one through which its output goes. Bytes sent to the socket are typed
/// at the first, and the output of the last is received.
fn run(command: &mut Command, filter: Option<&mut Command>) -> io::Result<Transport> {
    let command = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut program = command.spawn()?;
    let (typed, mut shown) = (program.stdin.take(), program.stdout.take());
    let mut programs = vec![program];
    if let Some(filter) = filter {
        let input = shown.map_or(Stdio::null(), Stdio::from);
        let mut filter = filter.stdin(input).stdout(Stdio::piped()).spawn()?;
        shown = filter.stdout.take();
        programs.push(filter);
    }
    let (near, far) = pair()?;
    let answers = far.try_clone()?;
    thread::spawn(move || typed.map(|typed| carry(far, typed, <[u8]>::to_vec)));
    thread::spawn(move || {
        let _ = shown.map(|shown| carry(shown, &answers, <[u8]>::to_vec));
        answers.shutdown(Shutdown::Write)
    });
    Ok((near, programs))
}

/// A program that stands between a socket of the suite and the server.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Via {
    Nc,
    Telnet,
}

impl Via {
    pub fn parse(name: &str) -> Result<Via, String> {
        match name {
            "nc" => Ok(Via::Nc),
            "telnet" => Ok(Via::Telnet),
            _ => Err(format!("clients can be nc or telnet, not {name}")),
        }
    }

    pub fn connect(self, address: &str) -> io::Result<Transport> {
        let (host, port) = address.rsplit_once(':').unwrap_or((address, ""));
        if self == Via::Nc {
            return run(Command::new("nc").args(["-N", host, port]), None);
        }
        // telnet wants a terminal to type at, and makes it echo; what it prints comes through a
        // descriptor of its own. It takes bytes of UTF-8 for the terminal's special characters, whose
        // eighth bit it ignores, so there are none here.
        let special = "intr quit erase kill eof eol susp start stop lnext werase rprnt discard";
        let special: String = special.split(' ').map(|name| format!("{name} 255 ")).collect();
        let telnet = format!(
            "exec 3>&1; exec script --quiet --command \
             'stty raw {special}; exec telnet -E {host} {port} >&3' /dev/null >/dev/null"
        );
        // The lines that telnet adds are removed, and CR put back, which it does not show.
        let filter = "1,/^Escape character/d; /^Connection closed by foreign/d; s/$/\\r/";
        let mut sed = Command::new("sed");
        run(Command::new("sh").args(["-c", &telnet]), Some(sed.args(["--unbuffered", filter])))
    }
}

/// Starts linechat-client, at a terminal if it has columns. Words like `LANG=pt` before its
/// arguments are for its environment.
pub fn linechat_client(arguments: &str, columns: Option<usize>) -> io::Result<Transport> {
    let client = env!("CARGO_BIN_EXE_linechat-client");
    let mut words: Vec<_> = arguments.split_whitespace().collect();
    let is_variable = |word: &&&str| !word.starts_with('-') && word.contains('=');
    let variables = words.iter().take_while(is_variable).count();
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
                "stty columns {columns} rows 24; settings=$(stty -g); \
                 sh -c 'echo $$; exec {client} {}'; status=$?; \
                 test \"$(stty -g)\" = $settings || echo the terminal has other settings now; \
                 exit $status",
                words.join(" ")
            ),
            "/dev/null",
        ]),
    };
    run(&mut command, None)
}

/// A terminal that linechat-client runs at: script(1) holds it, and `screen` shows it.
pub struct Terminal {
    pub screen: Screen,
    /// The process id of linechat-client; `None` until it is about to start.
    pub process: Option<u32>,
}

pub struct Client {
    pub name: String,
    pub socket: TcpStream,
    /// The programs at the other end of the socket.
    pub programs: Vec<Child>,
    /// The standard error of the first of them.
    pub complaints: Printed,
    pub terminal: Option<Terminal>,
    /// It is linechat-client, or the suite where that is the server: neither passes a fence.
    pub is_ours: bool,
    /// What is not yet compared with the transcript.
    received: VecDeque<u8>,
    /// It has received something.
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
}

impl Client {
    pub fn new(name: &str, (socket, mut programs): Transport, is_ours: bool) -> Client {
        Client {
            name: name.to_owned(),
            socket,
            complaints: Printed::by(programs.first_mut().and_then(|it| it.stderr.take())),
            programs,
            terminal: None,
            is_ours,
            received: VecDeque::new(),
            is_greeted: false,
            is_closed: false,
            is_reset: false,
            has_half_closed: false,
            is_exempt: false,
            is_mid_line: false,
            owes_fence: false,
        }
    }

    pub fn terminal(&mut self) -> Result<&mut Terminal, String> {
        self.terminal.as_mut().ok_or("there is no terminal".to_owned())
    }

    /// Sends all of it. While the server takes nothing, its output is read.
    pub fn send(&mut self, bytes: &[u8]) {
        let (mut rest, mut since) = (bytes, Instant::now());
        while !rest.is_empty() {
            match self.socket.write(rest) {
                Ok(length) => (rest, since) = (&rest[length..], Instant::now()),
                Err(error) if since.elapsed() > UNSENT || !is_late(&error) => {
                    // If the server has closed, a later step shows it.
                    self.is_reset |= !is_late(&error);
                    return;
                }
                Err(_) if self.is_exempt => {}
                Err(_) => while self.read(Duration::from_millis(1)) {},
            }
        }
        self.is_mid_line = bytes.last().is_some_and(|&last| last != b'\n');
        self.owes_fence = true;
    }

    pub fn end_input(&mut self) {
        let _ = self.socket.shutdown(Shutdown::Write);
        self.has_half_closed = true;
    }

    /// Receives something more, or the end. Returns false if neither comes in time.
    pub fn read(&mut self, timeout: Duration) -> bool {
        if self.is_closed || self.received.len() > TOO_MUCH {
            return false;
        }
        let (mut buffer, since) = ([0; 16 * 1024], Instant::now());
        let socket = &mut self.socket;
        let read = socket.set_read_timeout(Some(timeout)).and_then(|()| socket.read(&mut buffer));
        match (read, &mut self.terminal) {
            (Err(error), _) if is_late(&error) => {
                // The wait goes on after a signal.
                let rest = timeout.saturating_sub(since.elapsed());
                let is_interrupted = error.kind() == ErrorKind::Interrupted && !rest.is_zero();
                return is_interrupted && self.read(rest);
            }
            (Ok(length @ 1..), None) => self.received.extend(&buffer[..length]),
            (Ok(length @ 1..), Some(terminal)) => {
                self.received.extend(terminal.screen.print(&buffer[..length]));
            }
            (end, _) => {
                self.is_closed = true;
                self.is_reset |= end.is_err();
            }
        }
        self.is_greeted = true;
        self.received.make_contiguous();
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

    /// Removes the ending of a line. A line with another ending stays whole, and matches nothing.
    pub fn without_ending<'a>(&self, line: &'a [u8]) -> &'a [u8] {
        line.strip_suffix(self.ending()).unwrap_or(line)
    }

    /// linechat-client shows, and sends, LF for CR LF.
    fn ending(&self) -> &'static [u8] {
        match self.is_ours {
            true => b"\n",
            false => b"\r\n",
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

    /// A client sends no PING before the greeting, which must come without one.
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

/// Returns true if nothing could be received or sent in time. A signal interrupts a socket with a
/// time-out (signal(7)).
fn is_late(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted)
}

/// Closing the socket alone could end the connection later: the thread of a client that floods holds
/// the socket too, and so does a program that is just being started, until its exec(2).
impl Drop for Client {
    fn drop(&mut self) {
        let _ = self.socket.shutdown(Shutdown::Both);
        let process = self.terminal.as_ref().and_then(|terminal| terminal.process);
        for program in &mut self.programs {
            if program.try_wait().is_ok_and(|status| status.is_none()) {
                // script(1) ends with the program that it has started, or, except where that is a
                // shell's, ends it if it receives SIGTERM; SIGKILL does not reach the program.
                let _ = match process {
                    Some(process) => signal(process, "KILL"),
                    None => signal(program.id(), "TERM"),
                };
                let _ = program.wait();
            }
        }
    }
}
