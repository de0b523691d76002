//! A first look at a server, before any transcript: whether it can be judged at all, and whether it
//! does what every transcript rests on. If not, one sentence says so, and the run ends.

use crate::client::{socket, Client, Kind, SLICE};
use crate::text::show;
use crate::timeouts::Timeouts;
use std::time::{Duration, Instant};

/// Nothing is known yet of how fast a server is, so it gets this long for each answer.
const FIRST_ANSWER: Duration = Duration::from_secs(3);
/// A client that left is gone after this time and this many served requests of others.
const GONE: Duration = Duration::from_secs(1);
const OTHERS_SERVED: usize = 5;
/// A server that sends more than this before its answer, in bytes, sends garbage.
const GARBAGE: usize = 64 * 1024;
const NAME: &str = "probe";

/// Why no transcript can be played.
pub enum Verdict {
    /// It is not the server that is wrong.
    CannotJudge(String),
    Wrong(String),
}

fn wrong<T>(what: impl Into<String>) -> Result<T, Verdict> {
    Err(Verdict::Wrong(format!("the server {}", what.into())))
}

/// A client joins, asks and leaves, and is then gone.
pub fn probe(address: &str, timeouts: &Timeouts) -> Result<(), Verdict> {
    let mut probe = Probe::connect(address)?;
    for number in 1..=3 {
        let (sent, pong) = (Instant::now(), format!("PONG probe-{number}"));
        probe.client.send(format!("PING probe-{number}\n").as_bytes());
        let line = probe.line_with("PONG", "PING")?;
        if line != pong {
            return wrong(format!("answers 'PING probe-{number}' with '{line}'"));
        }
        timeouts.saw_pong_after(sent.elapsed());
    }
    let count = probe.join()?;
    if count > 1 {
        let why = format!("the server is not empty: {} in the room; let them leave", count - 1);
        return Err(Verdict::CannotJudge(why));
    }
    probe.client.send(b"QUIT\n");
    let since = Instant::now();
    while !probe.client.is_closed {
        probe.client.read(SLICE);
        if since.elapsed() > FIRST_ANSWER {
            return wrong("does not close the connection after QUIT");
        }
    }
    drop(is_empty_again(address, "has quit")?);
    is_empty_again(address, "has closed the connection")?.client.send(b"QUIT\n");
    Ok(())
}

/// Waits until the clients of the last transcript are gone.
pub fn wait_until_empty(address: &str) -> Result<(), String> {
    let left = is_empty_again(address, "closed the connection at the end of a transcript");
    let mut probe = left.map_err(|(Verdict::CannotJudge(why) | Verdict::Wrong(why))| why)?;
    probe.client.send(b"QUIT\n");
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
            Ok(count) if is_late => return wrong(format!("still counts {} who {how}", count - 1)),
            Err(Verdict::Wrong(what)) if what.contains("name-taken") => {
                if is_late {
                    return wrong(format!("does not free the name of one who {how}"));
                }
            }
            Ok(_) => {}
            Err(verdict) => return Err(verdict),
        }
        probe.client.send(b"QUIT\n");
    }
}

struct Probe {
    client: Client,
}

impl Probe {
    fn connect(address: &str) -> Result<Probe, Verdict> {
        let start = |why| Verdict::CannotJudge(format!("{why}; is the server running there?"));
        let socket = socket(address).map_err(start)?;
        let mut probe = Probe { client: Client::new(NAME, Kind::Bystander, socket, "\n") };
        match probe.line()? {
            Some(line) if line.starts_with("HELLO linechat/1") => Ok(probe),
            Some(line) if line.starts_with("ERR full") => {
                Err(Verdict::CannotJudge(format!("the server takes no connection: {line}")))
            }
            Some(line) => wrong(format!("does not begin with HELLO linechat/1 but with '{line}'")),
            None => wrong("says nothing: no HELLO comes"),
        }
    }

    /// The next line, for people; `None` if none comes.
    fn line(&mut self) -> Result<Option<String>, Verdict> {
        let since = Instant::now();
        loop {
            if let Some(line) = self.client.take_line() {
                return Ok(Some(show(line.trim_ascii_end())));
            } else if self.client.is_closed {
                return wrong("closes the connection at once");
            } else if self.client.received.len() > GARBAGE {
                return wrong("sends garbage without end");
            } else if since.elapsed() > FIRST_ANSWER {
                return Ok(None);
            }
            self.client.read(SLICE);
        }
    }

    /// The next line that begins like this; others are skipped.
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

    /// Joins, and returns how many are in the room.
    fn join(&mut self) -> Result<usize, Verdict> {
        self.client.send(format!("NAME {NAME}\n").as_bytes());
        let line = self.line_with("WELCOME", "NAME")?;
        match line.strip_prefix(&format!("WELCOME {NAME} ")).map(str::parse) {
            Some(Ok(count @ 1..)) => Ok(count),
            _ => wrong(format!("answers 'NAME {NAME}' with '{line}'")),
        }
    }
}
