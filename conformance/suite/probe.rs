//! A first look at a server, before any transcript: can it be judged, and does it do what every
//! transcript needs? If not, one sentence says so, and the run ends.

use crate::client::{connect, Client, SLICE};
use crate::text::show;
use crate::timeouts::Timeouts;
use std::time::{Duration, Instant};

/// Nothing is known yet of how fast a server is, so it gets this long for each answer.
const FIRST_ANSWER: Duration = Duration::from_secs(3);
/// A client that left is gone after this time and this many served requests of others.
const GONE: Duration = Duration::from_secs(1);
const OTHERS_SERVED: usize = 5;
/// Characters that are shown of what came instead of an answer.
const SHOWN: usize = 200;

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
    let (mut client, count) = join(address)?;
    if count > 1 {
        let why = format!("the server is not empty: {} in the room; let them leave", count - 1);
        return Err(Verdict::CannotJudge(why));
    }
    let sent = Instant::now();
    client.send(b"PING probe\n");
    hear(&mut client, "PONG probe", "after 'PING probe'")?;
    timeouts.saw_pong_after(sent.elapsed());
    quit(client)?;
    drop(join_alone(address, "has quit")?);
    quit(join_alone(address, "has closed the connection")?)
}

/// Waits until the clients of the last transcript are gone.
pub fn wait_until_empty(address: &str) -> Result<(), String> {
    let left = join_alone(address, "closed the connection at the end of a transcript");
    left.and_then(quit).map_err(|(Verdict::CannotJudge(why) | Verdict::Wrong(why))| why)
}

/// Joins as often as it takes to be the only client in the room.
fn join_alone(address: &str, how: &str) -> Result<Client, Verdict> {
    let (since, mut tries) = (Instant::now(), 0);
    loop {
        tries += 1;
        let is_late = since.elapsed() > GONE && tries > OTHERS_SERVED;
        match join(address) {
            Ok((client, 1)) => return Ok(client),
            Ok((_, count)) if is_late => {
                return wrong(format!("still counts {} that {how}", count - 1))
            }
            Ok((client, _)) => quit(client)?,
            Err(Verdict::Wrong(what)) if what.contains("name-taken") => {
                if is_late {
                    return wrong(format!("does not free the name of a client that {how}"));
                }
            }
            Err(verdict) => return Err(verdict),
        }
    }
}

/// Connects and joins. Returns how many are in the room, too.
fn join(address: &str) -> Result<(Client, usize), Verdict> {
    let socket = connect(address).map_err(|error| {
        let why = format!("cannot connect to {address}: {error}; is the server running there?");
        Verdict::CannotJudge(why)
    })?;
    let mut client = Client::new("probe", (socket, Vec::new()), false);
    hear(&mut client, "HELLO linechat/1", "at the beginning")?;
    client.send(b"NAME probe\n");
    let count = hear(&mut client, "WELCOME probe ", "after 'NAME probe'")?;
    match count.parse() {
        Ok(count @ 1..) => Ok((client, count)),
        _ => wrong(format!("answers 'NAME probe' with 'WELCOME probe {count}'")),
    }
}

fn quit(mut client: Client) -> Result<(), Verdict> {
    client.send(b"QUIT\n");
    let since = Instant::now();
    while !client.is_closed && since.elapsed() < FIRST_ANSWER {
        client.read(SLICE);
    }
    match client.is_closed {
        true => Ok(()),
        false => wrong("does not close the connection after QUIT"),
    }
}

/// Returns the rest of the first line that begins with `start`; other lines are skipped. `after` says
/// in an error what the client did before.
fn hear(client: &mut Client, start: &str, after: &str) -> Result<String, Verdict> {
    let (since, mut skipped) = (Instant::now(), String::new());
    while since.elapsed() < FIRST_ANSWER {
        let Some(line) = client.take_line() else {
            if client.is_closed {
                return wrong(format!("closes the connection {after}"));
            }
            client.read(SLICE);
            continue;
        };
        let line = show(line.trim_ascii_end());
        if let Some(rest) = line.strip_prefix(start) {
            return Ok(rest.to_owned());
        } else if line.starts_with("ERR full") {
            let why = format!("the server takes no connection: {line}");
            return Err(Verdict::CannotJudge(why));
        } else if line.starts_with("ERR ") {
            return wrong(format!("sends '{line}' {after}"));
        }
        skipped += &format!("{line}\\n");
    }
    skipped += &show(client.received());
    let sent: String = skipped.chars().take(SHOWN).collect();
    wrong(format!("sends no '{start}' {after}, but '{sent}'"))
}
