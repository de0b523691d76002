//! Servers broken on purpose, to see that the suite notices: a proxy that stands in front of the
//! real server and breaks one rule of PROTOCOL.md.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

/// What is done wrong.
#[derive(Clone, Copy)]
enum Rule {
    /// What becomes of one line on its way to a client: the lines that are sent in its place.
    ToClient(fn(&mut Crossing, &[u8]) -> Vec<Vec<u8>>),
    /// What becomes of a piece of what a client sends.
    ToServer(fn(&[u8]) -> Vec<u8>),
    /// What a client is owed once it has ended its side of the connection is thrown away.
    ForgetsHalfClosed,
    /// The connection is not ended when it should be.
    NeverCloses,
}

use Rule::{ForgetsHalfClosed, NeverCloses, ToClient, ToServer};

pub struct Proxy {
    /// What it does wrong, as in "a server that …".
    pub fault: &'static str,
    rule: Rule,
}

/// A proxy at work. It stops when this is dropped.
pub struct Standing {
    pub address: String,
    is_over: Arc<AtomicBool>,
}

impl Drop for Standing {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::SeqCst);
        // Wakes the thread that waits for connections.
        let _ = TcpStream::connect(&self.address);
    }
}

/// Everybody who is connected through one proxy: where lines for them go, and their name.
type Everybody = Arc<Mutex<BTreeMap<usize, (TcpStream, String)>>>;

/// What a rule can know of the connection that a line is crossing.
struct Crossing {
    id: usize,
    everybody: Everybody,
    /// What the client has sent last.
    request: Arc<Mutex<Vec<u8>>>,
    /// The line that crossed before this one.
    previous: Vec<u8>,
    held: Vec<Vec<u8>>,
    lines: usize,
}

impl Crossing {
    fn name(&self) -> String {
        let everybody = self.everybody.lock().unwrap();
        everybody.get(&self.id).map(|(_, name)| name.clone()).unwrap_or_default()
    }

    /// Sends a line to those whom `to` picks by their name; it is empty before WELCOME.
    fn inject(&self, line: &[u8], to: impl Fn(&str) -> bool) {
        for (socket, name) in self.everybody.lock().unwrap().values_mut() {
            if to(name) {
                let _ = socket.write_all(line);
            }
        }
    }
}

fn words(line: &[u8]) -> Vec<String> {
    String::from_utf8_lossy(line).trim_end().split(' ').map(str::to_owned).collect()
}

fn starts(line: &[u8], with: &str) -> bool {
    line.starts_with(with.as_bytes())
}

fn replace(line: &[u8], from: &str, to: &str) -> Vec<Vec<u8>> {
    vec![String::from_utf8_lossy(line).replacen(from, to, 1).into_bytes()]
}

fn unchanged(line: &[u8]) -> Vec<Vec<u8>> {
    vec![line.to_vec()]
}

/// Loses the lines that start so.
macro_rules! loses {
    ($start:literal) => {
        ToClient(|_, line| if starts(line, $start) { Vec::new() } else { unchanged(line) })
    };
}

/// Puts one text in the place of another.
macro_rules! writes {
    ($to:literal for $from:literal) => {
        ToClient(|_, line| replace(line, $from, $to))
    };
}

#[rustfmt::skip]
const FAULTS: &[(&str, Rule)] = &[
    ("forgets to greet", loses!("HELLO ")),
    ("ends HELLO with a space", ToClient(|_, line| match starts(line, "HELLO ") {
        true => vec![b"HELLO linechat/1 \r\n".to_vec()],
        false => unchanged(line),
    })),
    ("greets with another version", writes!("linechat/2" for "linechat/1")),
    ("forgets WELCOME", loses!("WELCOME ")),
    ("does not announce who joins", loses!("JOINED ")),
    ("does not announce who leaves", loses!("LEFT ")),
    ("never sends the roster", loses!("USERS ")),
    ("drops the confirmation", loses!("SENT ")),
    ("drops private messages", loses!("PRIV ")),
    ("says no BYE", loses!("BYE ")),
    ("answers no telnet command", ToClient(|_, line| match line {
        [255, ..] => Vec::new(),
        _ => unchanged(line),
    })),
    ("gives a lost connection out as a quit", writes!("quit\r" for "disconnected\r")),
    ("gives a quit out as a lost connection", writes!("disconnected\r" for "quit\r")),
    ("calls a bad name taken", writes!("ERR name-taken" for "ERR bad-name")),
    ("calls a taken name bad", writes!("ERR bad-name" for "ERR name-taken")),
    ("mixes up not-named and already-named", writes!("ERR already" for "ERR not")),
    ("calls misuse an unknown command", writes!("ERR unknown-command" for "ERR usage")),
    ("echoes a message to its sender", ToClient(|crossing, line| {
        if starts(line, "MSG ") {
            let from = words(line).swap_remove(1);
            crossing.inject(line, |name| name == from);
        }
        unchanged(line)
    })),
    ("delivers messages to people without a name", ToClient(|crossing, line| {
        if starts(line, "MSG ") {
            crossing.inject(line, str::is_empty);
        }
        unchanged(line)
    })),
    ("delivers a private message to a third person", ToClient(|crossing, line| {
        if starts(line, "PRIV ") {
            let (from, to) = (words(line).swap_remove(1), crossing.name());
            crossing.inject(line, |name| !name.is_empty() && name != from && name != to);
        }
        unchanged(line)
    })),
    ("delivers a private message as a public one", writes!("MSG " for "PRIV ")),
    ("skips the roster after a lost connection", ToClient(|crossing, line| {
        let was_lost =
            words(&crossing.previous).last().is_some_and(|last| last == "disconnected");
        if starts(line, "USERS ") && was_lost {
            return Vec::new();
        }
        unchanged(line)
    })),
    ("skips the roster after a join", ToClient(|crossing, line| {
        if starts(line, "USERS ") && starts(&crossing.previous, "JOINED ") {
            return Vec::new();
        }
        unchanged(line)
    })),
    ("swaps two lines", ToClient(|crossing, line| {
        if starts(line, "JOINED ") {
            crossing.held.push(line.to_vec());
            return Vec::new();
        }
        let mut lines = unchanged(line);
        lines.append(&mut crossing.held);
        lines
    })),
    ("keeps a message back until something else comes", ToClient(|crossing, line| {
        let mut lines = std::mem::take(&mut crossing.held);
        if starts(line, "MSG ") {
            crossing.held.push(line.to_vec());
        } else if starts(line, "PONG ") {
            lines.insert(0, line.to_vec());
        } else {
            lines.push(line.to_vec());
        }
        lines
    })),
    ("lets control characters through", ToClient(|crossing, line| {
        if !starts(line, "ERR bad-text") {
            return unchanged(line);
        }
        let request = crossing.request.lock().unwrap().clone();
        let from = crossing.name();
        let message = [b"MSG ", from.as_bytes(), request.strip_prefix(b"MSG").unwrap_or(b" ?")];
        crossing.inject(&message.concat(), |name| !name.is_empty() && name != from);
        Vec::new()
    })),
    ("cuts long lines", ToClient(|_, line| match line.get(..4000) {
        Some(start) => vec![start.to_vec(), b"\r\n".to_vec()],
        None => unchanged(line),
    })),
    ("forgets the CR", ToClient(|_, line| match line.strip_suffix(b"\r\n") {
        Some(line) => vec![line.to_vec(), b"\n".to_vec()],
        None => unchanged(line),
    })),
    ("repeats a line", ToClient(|_, line| match starts(line, "LEFT ") {
        true => vec![line.to_vec(), line.to_vec()],
        false => unchanged(line),
    })),
    ("loses every hundredth line", ToClient(|crossing, line| match crossing.lines % 100 {
        0 => Vec::new(),
        _ => unchanged(line),
    })),
    ("counts one too few", ToClient(|_, line| {
        let mut words = words(line);
        match words.as_mut_slice() {
            [keyword, _, count, ..] if matches!(keyword.as_str(), "JOINED" | "LEFT") => {
                *count = count
                    .parse::<usize>()
                    .map_or(0, |count| count.saturating_sub(1))
                    .to_string();
                vec![(words.join(" ") + "\r\n").into_bytes()]
            }
            _ => unchanged(line),
        }
    })),
    ("shows names in lower case", ToClient(|_, line| match starts(line, "JOINED ") {
        true => vec![b"JOINED ".to_vec(), line[7..].to_ascii_lowercase()],
        false => unchanged(line),
    })),
    ("takes the spaces before a text away", ToClient(|_, line| replace(line, "  ", " "))),
    ("sorts the roster by name", ToClient(|_, line| {
        let mut words = words(line);
        if starts(line, "USERS ") {
            words[2..].sort();
            return vec![(words.join(" ") + "\r\n").into_bytes()];
        }
        unchanged(line)
    })),
    ("forgets the token of PONG", ToClient(|_, line| match starts(line, "PONG fence") {
        true => unchanged(line),
        false => replace(line, &words(line).concat(), &words(line)[0]),
    })),
    ("tells a newcomer of himself", ToClient(|_, line| match starts(line, "WELCOME ") {
        true => {
            let joined = String::from_utf8_lossy(line).replacen("WELCOME", "JOINED", 1);
            vec![line.to_vec(), joined.into_bytes()]
        }
        false => unchanged(line),
    })),
    ("tells a quitter of himself", ToClient(|crossing, line| match starts(line, "BYE ") {
        true => {
            vec![format!("LEFT {} 0 quit\r\n", crossing.name()).into_bytes(), line.to_vec()]
        }
        false => unchanged(line),
    })),
    ("closes after an error", ToClient(|_, line| match starts(line, "ERR ") {
        true => vec![line.to_vec(), CLOSE.to_vec()],
        false => unchanged(line),
    })),
    ("shows private messages to people without a name", ToClient(|crossing, line| {
        if starts(line, "PRIV ") {
            crossing.inject(line, str::is_empty);
        }
        unchanged(line)
    })),
    ("shows errors to everybody", ToClient(|crossing, line| {
        if starts(line, "ERR ") {
            let name = crossing.name();
            crossing.inject(line, |other| other != name);
        }
        unchanged(line)
    })),
    ("greets only after the first request", ToClient(|crossing, line| {
        if starts(line, "HELLO ") {
            crossing.held.push(line.to_vec());
            return Vec::new();
        }
        let mut lines = std::mem::take(&mut crossing.held);
        lines.push(line.to_vec());
        lines
    })),
    ("forgets the count of WELCOME", ToClient(|_, line| match starts(line, "WELCOME ") {
        true => vec![format!("{} {}\r\n", words(line)[0], words(line)[1]).into_bytes()],
        false => unchanged(line),
    })),
    ("takes a bad name", ToClient(|_, line| match starts(line, "ERR bad-name") {
        true => vec![b"WELCOME somebody 1\r\n".to_vec()],
        false => unchanged(line),
    })),
    ("explains itself in escape sequences", ToClient(|_, line| match starts(line, "ERR ") {
        true => vec![line[..line.len() - 2].to_vec(), b" \x1b[7m!\x1b[m\r\n".to_vec()],
        false => unchanged(line),
    })),
    ("ends HELP with an empty line", ToClient(|crossing, line| {
        let is_behind = starts(&crossing.previous, "HELP ") && !starts(line, "HELP ");
        let empty = if is_behind { b"HELP\r\n".to_vec() } else { Vec::new() };
        vec![empty, line.to_vec()]
    })),
    ("writes counts with leading zeros", writes!(" 02" for " 2")),
    ("takes every packet for a line", ToServer(|piece| match piece.last() {
        Some(b'\n') => piece.to_vec(),
        _ => [piece, b"\n"].concat(),
    })),
    ("carries out one line of each packet", ToServer(|piece| {
        piece.split_inclusive(|&byte| byte == b'\n').next().unwrap_or_default().to_vec()
    })),
    ("does not understand a telnet command that comes in two packets", ToServer(|piece| match piece.ends_with(&[255]) {
        true => piece[..piece.len() - 1].to_vec(),
        false => piece.to_vec(),
    })),
    ("takes a verb in Unicode's upper case", ToServer(|piece| {
        String::from_utf8(piece.to_vec()).map_or(piece.to_vec(), |text| {
            text.replace('\u{17f}', "S").replace('\u{131}', "I").into_bytes()
        })
    })),
    ("takes a CR anywhere for a line's end", ToServer(|piece| {
        piece.iter().map(|&byte| if byte == b'\r' { b'\n' } else { byte }).collect()
    })),
    ("does not erase", ToServer(|piece| piece.iter().copied().filter(|byte| !matches!(byte, 8 | 127)).collect())),
    ("takes spaces at the end away", ToServer(|piece| {
        String::from_utf8(piece.to_vec())
            .map_or(piece.to_vec(), |text| text.replace(" \n", "\n").into_bytes())
    })),
    ("throws away what a half-closed client is owed", ForgetsHalfClosed),
    ("does not close after QUIT", NeverCloses),
];

/// A rule returns this to have the connection closed.
const CLOSE: &[u8] = b"\0close";

impl Proxy {
    pub fn honest() -> Arc<Proxy> {
        Arc::new(Proxy { fault: "breaks nothing", rule: ToClient(|_, line| unchanged(line)) })
    }

    /// One for each fault.
    pub fn broken() -> impl Iterator<Item = Arc<Proxy>> {
        FAULTS.iter().map(|&(fault, rule)| Arc::new(Proxy { fault, rule }))
    }

    /// Puts the proxy in front of a server.
    pub fn in_front_of(self: &Arc<Proxy>, server: &str) -> io::Result<Standing> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?.to_string();
        let is_over = Arc::new(AtomicBool::new(false));
        let (proxy, server, over) = (self.clone(), server.to_owned(), is_over.clone());
        thread::spawn(move || {
            let everybody = Everybody::default();
            for (id, client) in listener.incoming().enumerate() {
                if over.load(Ordering::SeqCst) {
                    break;
                }
                let Ok(client) = client else { continue };
                let Ok(server) = TcpStream::connect(&server) else { continue };
                let _ = proxy.connect(id, client, server, &everybody);
            }
        });
        Ok(Standing { address, is_over })
    }

    fn connect(
        self: &Arc<Proxy>,
        id: usize,
        client: TcpStream,
        mut server: TcpStream,
        everybody: &Everybody,
    ) -> io::Result<()> {
        client.set_nodelay(true)?;
        server.set_nodelay(true)?;
        everybody.lock().unwrap().insert(id, (client.try_clone()?, String::new()));
        let request = Arc::new(Mutex::new(Vec::new()));
        let mut crossing = Crossing {
            id,
            everybody: everybody.clone(),
            request: request.clone(),
            previous: Vec::new(),
            held: Vec::new(),
            lines: 0,
        };
        let (to_server, mut to_client) = (server.try_clone()?, client.try_clone()?);
        let proxy = self.clone();
        thread::spawn(move || proxy.carry_requests(client, to_server, &request));
        let proxy = self.clone();
        thread::spawn(move || {
            let mut buffer = [0; 16 * 1024];
            let mut pending = Vec::new();
            while let Ok(length @ 1..) = server.read(&mut buffer) {
                pending.extend(&buffer[..length]);
                if proxy.forward(&mut crossing, &mut pending, &mut to_client).is_err() {
                    break;
                }
            }
            crossing.everybody.lock().unwrap().remove(&crossing.id);
            // As long as the other thread reads from it, the connection is not ended by itself.
            if !matches!(proxy.rule, NeverCloses) {
                let _ = to_client.shutdown(Shutdown::Write);
            }
            let _ = server.shutdown(Shutdown::Both);
        });
        Ok(())
    }

    /// Sends on what a client says, until it ends its side.
    fn carry_requests(&self, mut client: TcpStream, mut server: TcpStream, last: &Mutex<Vec<u8>>) {
        let mut buffer = [0; 16 * 1024];
        while let Ok(length @ 1..) = client.read(&mut buffer) {
            let piece = &buffer[..length];
            if let Some(line) = piece.split_inclusive(|&byte| byte == b'\n').next() {
                *last.lock().unwrap() = line.to_vec();
            }
            let carried = match self.rule {
                ToServer(rule) => server.write_all(&rule(piece)),
                _ => server.write_all(piece),
            };
            if carried.is_err() {
                break;
            }
        }
        if let ForgetsHalfClosed = self.rule {
            let _ = client.shutdown(Shutdown::Both);
        }
        let _ = server.shutdown(Shutdown::Write);
    }

    /// Sends what is whole of `pending` on, through the rule.
    fn forward(
        &self,
        crossing: &mut Crossing,
        pending: &mut Vec<u8>,
        client: &mut TcpStream,
    ) -> io::Result<()> {
        loop {
            let end = match pending.first() {
                // A telnet command, which no line ending follows.
                Some(255) if pending.len() >= 3 => 3,
                _ => match pending.iter().position(|&byte| byte == b'\n') {
                    Some(at) => at + 1,
                    None => return Ok(()),
                },
            };
            let line: Vec<u8> = pending.drain(..end).collect();
            crossing.lines += 1;
            if starts(&line, "WELCOME ") {
                if let Some((_, name)) = crossing.everybody.lock().unwrap().get_mut(&crossing.id) {
                    *name = words(&line).swap_remove(1);
                }
            }
            let lines = match self.rule {
                ToClient(rule) => rule(crossing, &line),
                _ => unchanged(&line),
            };
            if lines.iter().any(|line| line == CLOSE) {
                return client.shutdown(Shutdown::Both);
            }
            client.write_all(&lines.concat())?;
            crossing.previous = line;
        }
    }
}
