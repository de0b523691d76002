//! A first look at a server, before any transcript: whether it can be judged at all, and whether it
//! does what everything else rests on. What is wrong is said in one sentence, and the run ends.

use crate::clients::is_late;
use crate::patience::Patience;
use std::fmt;
use std::io::{Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::time::{Duration, Instant};

/// Nothing is known yet of how fast a server is, so it gets this long for each answer.
const FIRST_ANSWER: Duration = Duration::from_secs(3);
/// One who left is gone after so long and so many served requests of others.
const GONE: Duration = Duration::from_secs(1);
const OTHERS_SERVED: usize = 5;
/// A server that says more than this before its answer, in bytes, sends garbage.
const GARBAGE: usize = 64 * 1024;
const NAME: &str = "probe";

/// Why there is nothing to be gained from playing transcripts.
pub enum Verdict {
    /// It is not the server that is wrong.
    CannotJudge(String),
    Wrong(String),
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Verdict::CannotJudge(why) | Verdict::Wrong(why) => f.write_str(why),
        }
    }
}

fn wrong<T>(what: impl Into<String>) -> Result<T, Verdict> {
    Err(Verdict::Wrong(format!("the server {}", what.into())))
}

/// Looks whether somebody can come, ask and go, and is then gone.
pub fn probe(address: &str, patience: &Patience) -> Result<(), Verdict> {
    let mut probe = Probe::connect(address)?;
    probe.ping(patience)?;
    match probe.join()? {
        1 => {}
        count => {
            let why = format!("the server is not empty: {} in the room; let them leave", count - 1);
            return Err(Verdict::CannotJudge(why));
        }
    }
    probe.send("QUIT\n");
    probe.await_end("does not close the connection after QUIT")?;
    is_empty_again(address, "has quit")?.hang_up();
    is_empty_again(address, "has closed the connection")?.send("QUIT\n");
    Ok(())
}

/// Waits until one who left is gone.
pub fn wait_until_empty(address: &str) -> Result<(), Verdict> {
    let mut probe = is_empty_again(address, "closed the connection at the end of a transcript")?;
    probe.send("QUIT\n");
    // With BYE its leaving is done; the connection may end later.
    while matches!(probe.line(), Ok(Some(line)) if !line.starts_with("BYE")) {}
    Ok(())
}

/// Joins, as often as it takes to be the only one.
fn is_empty_again(address: &str, how: &str) -> Result<Probe, Verdict> {
    let (since, mut tries) = (Instant::now(), 0);
    loop {
        tries += 1;
        let is_late = since.elapsed() > GONE && tries > OTHERS_SERVED;
        let mut probe = Probe::connect(address)?;
        match probe.join() {
            Ok(1) => return Ok(probe),
            Ok(_) if !is_late => probe.quit(),
            Ok(count) => {
                return wrong(format!("still counts {} who {how}", count - 1));
            }
            Err(Verdict::Wrong(what)) if what.contains("name-taken") => {
                if is_late {
                    return wrong(format!("does not free the name of one who {how}"));
                }
                probe.quit();
            }
            Err(verdict) => return Err(verdict),
        }
    }
}

struct Probe {
    socket: TcpStream,
    received: Vec<u8>,
}

impl Probe {
    fn connect(address: &str) -> Result<Probe, Verdict> {
        let found = address.to_socket_addrs().ok().into_iter().flatten();
        let connected = found
            .map(|address| TcpStream::connect_timeout(&address, FIRST_ANSWER))
            .reduce(|one, other| one.or(other));
        let socket = match connected {
            Some(Ok(socket)) => socket,
            Some(Err(error)) => {
                let why = format!("nothing listens at {address}: {error}; start the server first");
                return Err(Verdict::CannotJudge(why));
            }
            None => {
                let why = format!("{address} is no address; give HOST:PORT");
                return Err(Verdict::CannotJudge(why));
            }
        };
        let _ = socket.set_nodelay(true);
        let _ = socket.set_read_timeout(Some(Duration::from_millis(50)));
        let _ = socket.set_write_timeout(Some(FIRST_ANSWER));
        let mut probe = Probe { socket, received: Vec::new() };
        match probe.line()? {
            Some(line) if line.starts_with("HELLO linechat/1") => Ok(probe),
            Some(line) if line.starts_with("ERR full") => {
                Err(Verdict::CannotJudge(format!("the server takes no connection: {line}")))
            }
            Some(line) => wrong(format!("does not begin with HELLO linechat/1 but with '{line}'")),
            None => wrong("says nothing: no HELLO comes"),
        }
    }

    fn send(&mut self, text: &str) {
        // A server that has closed shows in what is received, or is not.
        let _ = self.socket.write_all(text.as_bytes());
    }

    /// The next line, as text for people; nothing if none comes.
    fn line(&mut self) -> Result<Option<String>, Verdict> {
        let since = Instant::now();
        loop {
            if let Some(end) = self.received.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = self.received.drain(..=end).collect();
                let line = String::from_utf8_lossy(&line).trim_end().to_owned();
                return Ok(Some(line.chars().take(200).collect()));
            }
            if self.received.len() > GARBAGE {
                return wrong("sends garbage without end");
            }
            if since.elapsed() > FIRST_ANSWER {
                return Ok(None);
            }
            self.read()?;
        }
    }

    fn read(&mut self) -> Result<(), Verdict> {
        let mut buffer = [0; 16 * 1024];
        match self.socket.read(&mut buffer) {
            Ok(length @ 1..) => self.received.extend(&buffer[..length]),
            Err(error) if is_late(&error) => {}
            Ok(0) | Err(_) => return wrong("closes the connection at once"),
        }
        Ok(())
    }

    /// The next line that begins with this, others skipped.
    fn line_with(&mut self, start: &str, asked: &str) -> Result<String, Verdict> {
        let (since, mut skipped) = (Instant::now(), 0);
        loop {
            match self.line()? {
                None => return wrong(format!("hangs: {asked} is not answered")),
                Some(line) if line.starts_with(start) => return Ok(line),
                Some(line) if line.starts_with("ERR ") => {
                    return wrong(format!("answers {asked} with '{line}'"))
                }
                Some(line) => skipped += line.len() + 2,
            }
            if skipped > GARBAGE || since.elapsed() > FIRST_ANSWER {
                return wrong(format!("sends garbage without end, and {asked} is not answered"));
            }
        }
    }

    fn ping(&mut self, patience: &Patience) -> Result<(), Verdict> {
        for number in 1..=3 {
            let sent = Instant::now();
            self.send(&format!("PING probe-{number}\n"));
            let line = self.line_with("PONG", "PING")?;
            if line != format!("PONG probe-{number}") {
                return wrong(format!("answers 'PING probe-{number}' with '{line}'"));
            }
            patience.saw_pong_after(sent.elapsed());
        }
        Ok(())
    }

    /// Joins, and says how many are in the room.
    fn join(&mut self) -> Result<usize, Verdict> {
        self.send(&format!("NAME {NAME}\n"));
        let line = self.line_with("WELCOME", "NAME")?;
        match line.strip_prefix(&format!("WELCOME {NAME} ")).map(str::parse) {
            Some(Ok(count @ 1..)) => Ok(count),
            _ => wrong(format!("answers 'NAME {NAME}' with '{line}'")),
        }
    }

    fn quit(mut self) {
        self.send("QUIT\n");
    }

    fn hang_up(self) {}

    fn await_end(&mut self, otherwise: &str) -> Result<(), Verdict> {
        let since = Instant::now();
        while self.read().is_ok() {
            if since.elapsed() > FIRST_ANSWER {
                return wrong(otherwise);
            }
        }
        Ok(())
    }
}
