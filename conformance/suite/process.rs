//! Starts, watches and ends the server's process.

// Each of the programs that include this file uses a part of it.
#![allow(dead_code)]

use std::io::{self, ErrorKind, Read};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{sync_channel, Receiver, RecvTimeoutError};
use std::time::Duration;
use std::{fs, thread};

/// After this long a run is stuck and fails. No test that passes waits for it.
pub const STUCK: Duration = Duration::from_secs(30);

/// A server of this repository, started for one test and ended with it.
pub struct Server {
    pub child: Child,
    /// Where it listens.
    pub address: String,
    console: Printed,
    complaints: Printed,
}

impl Server {
    /// Starts it on a free port.
    pub fn start(options: &[String]) -> Result<Server, String> {
        Server::start_as(Command::new(env!("CARGO_BIN_EXE_linechat-server")).args(options))
    }

    /// The same, by a command that runs it in a particular way.
    pub fn start_as(command: &mut Command) -> Result<Server, String> {
        let mut child = command
            .arg("127.0.0.1:0")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|error| format!("cannot start the server: {error}"))?;
        let console = Printed::by(child.stdout.take());
        let complaints = Printed::by(child.stderr.take());
        let mut server = Server { child, address: String::new(), console, complaints };
        let line = server.next_line_within(STUCK)?.unwrap_or_default();
        let address = line.strip_prefix("listening on ");
        server.address = address.ok_or(format!("the server does not listen: {line}"))?.to_owned();
        Ok(server)
    }

    /// The next line of the console without its time. `Ok(None)` at the end.
    pub fn next_line_within(&mut self, timeout: Duration) -> Result<Option<String>, String> {
        let line = self.console.line(timeout).map_err(|_| "the console shows nothing more")?;
        let Some(line) = line else { return Ok(None) };
        let is_time = |time: &str| {
            let digits = |c: char| if c.is_ascii_digit() { '0' } else { c };
            time.chars().map(digits).eq("0000-00-00T00:00:00Z".chars())
        };
        match line.split_once(' ') {
            Some((time, line)) if is_time(time) => Ok(Some(line.to_owned())),
            _ => Err(format!("a line of the console without its time: {line}")),
        }
    }

    /// What it has written to standard error; it must have ended.
    pub fn complaints(&mut self) -> String {
        self.complaints.rest(STUCK).unwrap_or_default()
    }

    /// How it has ended; `None` if it does not end in time.
    pub fn wait_within(&mut self, timeout: Duration) -> Option<ExitStatus> {
        // It ends its standard error no sooner than itself.
        while self.complaints.more(timeout).ok()? {}
        self.child.wait().ok()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What a program prints, read by a thread of its own because pipes know no time-outs.
pub struct Printed {
    pieces: Receiver<Vec<u8>>,
    pub unread: Vec<u8>,
}

impl Printed {
    pub fn by(pipe: Option<impl Read + Send + 'static>) -> Printed {
        let (sender, pieces) = sync_channel(4);
        if let Some(mut pipe) = pipe {
            thread::spawn(move || {
                let mut buffer = [0; 4096];
                while let Ok(length @ 1..) = pipe.read(&mut buffer) {
                    if sender.send(buffer[..length].to_vec()).is_err() {
                        break;
                    }
                }
            });
        }
        Printed { pieces, unread: Vec::new() }
    }

    /// Appends what comes next to `unread`. `Ok(false)` at the end.
    pub fn more(&mut self, timeout: Duration) -> io::Result<bool> {
        match self.pieces.recv_timeout(timeout) {
            Ok(bytes) => self.unread.extend(bytes),
            Err(RecvTimeoutError::Timeout) => return Err(ErrorKind::TimedOut.into()),
            Err(RecvTimeoutError::Disconnected) => return Ok(false),
        }
        Ok(true)
    }

    /// Takes the next line without its LF. `Ok(None)` at the end.
    pub fn line(&mut self, timeout: Duration) -> io::Result<Option<String>> {
        loop {
            if let Some(end) = self.unread.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = self.unread.drain(..=end).take(end).collect();
                return Ok(Some(String::from_utf8_lossy(&line).into_owned()));
            } else if !self.more(timeout)? {
                return Ok(None);
            }
        }
    }

    /// Takes everything to the end.
    pub fn rest(&mut self, timeout: Duration) -> io::Result<String> {
        while self.more(timeout)? {}
        Ok(String::from_utf8_lossy(&std::mem::take(&mut self.unread)).into_owned())
    }
}

/// What the kernel counts for the server's process (proc(5)).
impl Server {
    /// Memory in bytes: what it really occupies (`VmRSS:`), or the most that it ever did (`VmHWM:`).
    pub fn memory(&self, field: &str) -> usize {
        let path = format!("/proc/{}/status", self.child.id());
        let status = fs::read_to_string(path).unwrap_or_default();
        let number = |line: &str| line.strip_prefix(field)?.split_whitespace().next()?.parse().ok();
        status.lines().find_map(number).map_or(0, |kilobytes: usize| kilobytes * 1024)
    }

    /// The numbers of the descriptors that it has open.
    pub fn descriptors(&self) -> Vec<usize> {
        let folder = fs::read_dir(format!("/proc/{}/fd", self.child.id()));
        let names = folder.into_iter().flatten().flatten().map(|entry| entry.file_name());
        names.filter_map(|name| name.to_str()?.parse().ok()).collect()
    }
}

/// Processor time that a process has used, in user and system mode.
pub fn processor_time(process: u32) -> Duration {
    let schedule = fs::read_to_string(format!("/proc/{process}/schedstat")).unwrap_or_default();
    let nanoseconds = schedule.split_whitespace().next().and_then(|word| word.parse().ok());
    Duration::from_nanos(nanoseconds.unwrap_or(0))
}

/// Sends a signal, named as for kill(1), with `SIG` before it or without.
pub fn signal(process: u32, signal: &str) -> Result<(), String> {
    let signal = signal.trim_start_matches("SIG");
    let mut kill = Command::new("kill");
    match kill.args(["-s", signal, &process.to_string()]).stderr(Stdio::null()).status() {
        Ok(status) if status.success() => Ok(()),
        _ => Err(format!("cannot send SIG{signal}")),
    }
}

/// How many connections a test may have open at once, less what everything else needs.
pub fn descriptor_limit() -> usize {
    let limits = fs::read_to_string("/proc/self/limits").unwrap_or_default();
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files"));
    let soft = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
    soft.unwrap_or(256_usize).saturating_sub(200)
}
