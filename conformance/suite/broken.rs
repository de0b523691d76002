//! Servers broken on purpose, to see that the suite notices: a proxy that stands in front of the
//! real server and breaks one rule of PROTOCOL.md.

use crate::client::{carry, pair};
use std::io::{self, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;

/// What is done wrong. A line is named by what it starts with.
#[derive(Clone, Copy)]
pub enum Rule {
    Nothing,
    /// These lines are lost after a line that contains the second text.
    Lose(&'static str, &'static str),
    /// The second text is written for the first.
    Write(&'static str, &'static str),
    /// This is sent for these lines.
    Change(&'static str, fn(&[u8]) -> Vec<u8>),
    /// These lines are sent after the next one.
    Delay(&'static str),
    /// These lines are sent to other clients, too, if this is true for the name of the client (empty
    /// before WELCOME) and for the name that the line is from.
    Leak(&'static str, fn(&str, &str) -> bool),
    /// This is sent for what a client sends in one piece.
    ToServer(fn(&[u8]) -> Vec<u8>),
    /// The output for a client that has half-closed is thrown away.
    ForgetHalfClosed,
    NeverClose,
}

use Rule::*;

pub type Fault = (&'static str, Rule);

fn words(line: &[u8]) -> Vec<String> {
    String::from_utf8_lossy(line).trim_end().split(' ').map(str::to_owned).collect()
}

fn with_words(line: &[u8], change: impl Fn(&mut Vec<String>)) -> Vec<u8> {
    let mut words = words(line);
    change(&mut words);
    (words.join(" ") + "\r\n").into_bytes()
}

fn starts(line: &[u8], with: &str) -> bool {
    line.starts_with(with.as_bytes())
}

fn replace(line: &[u8], from: &str, to: &str) -> Vec<u8> {
    String::from_utf8_lossy(line).replacen(from, to, 1).into_bytes()
}

fn text(line: &[u8], change: impl Fn(&str) -> String) -> Vec<u8> {
    std::str::from_utf8(line).map_or(line.to_vec(), |line| change(line).into_bytes())
}

/// Each fault, in words that follow "a server that …".
#[rustfmt::skip]
pub static FAULTS: &[Fault] = &[
    ("breaks nothing", Nothing),
    ("forgets to greet", Lose("HELLO ", "")),
    ("greets only after the first request", Delay("HELLO ")),
    ("ends HELLO with a space", Change("HELLO ", |_| b"HELLO linechat/1 \r\n".to_vec())),
    ("announces a newcomer to itself", Change("WELCOME ", |line| [line, &replace(line, "WELCOME", "JOINED")].concat())),
    ("announces names in lower case", Change("JOINED ", |line| text(line, |line| format!("JOINED {}", line[7..].to_lowercase())))),
    ("swaps two lines", Delay("JOINED ")),
    ("repeats a line", Change("LEFT ", |line| line.repeat(2))),
    ("counts one too few", Change("LEFT ", |line| with_words(line, |words| words[2] = "0".to_owned()))),
    ("announces a quit as a lost connection", Write("quit\r", "disconnected\r")),
    ("never sends the roster", Lose("USERS ", "")),
    ("skips the roster after a lost connection", Lose("USERS ", " disconnected\r")),
    ("sorts the roster by name", Change("USERS ", |line| with_words(line, |words| words[2..].sort()))),
    ("echoes a message to its sender", Leak("MSG ", |name, from| name == from)),
    ("shows private messages to clients without a name", Leak("PRIV ", |name, _| name.is_empty())),
    ("delays a message until something else comes", Delay("MSG ")),
    ("cuts long lines", Change("MSG ", |line| [&line[..line.len().min(4002) - 2], b"\r\n"].concat())),
    ("removes the spaces before a text", Write("  ", " ")),
    ("drops the confirmation", Lose("SENT ", "")),
    ("delivers a private message to a third client", Leak("PRIV ", |name, from| !name.is_empty() && name != from)),
    ("forgets the token of PONG", Change("PONG ", |line| {
        if starts(line, "PONG fence") { line.to_vec() } else { b"PONG\r\n".to_vec() }
    })),
    ("ends HELP with an empty line", Change("HELP QUIT", |line| [line, b"HELP\r\n"].concat())),
    ("says no BYE", Lose("BYE ", "")),
    ("sends a leaving client its own LEFT", Change("BYE ", |line| [b"LEFT me 0 quit\r\n", line].concat())),
    ("shows errors to everybody", Leak("ERR ", |name, from| !name.is_empty() && name != from)),
    ("explains itself in escape sequences", Change("ERR ", |line| replace(line, "\r", " \x1b[7m!\r"))),
    ("accepts a bad name", Change("ERR bad-name", |_| b"WELCOME somebody 1\r\n".to_vec())),
    ("calls a taken name bad", Write("ERR name-taken", "ERR bad-name")),
    ("mixes up not-named and already-named", Write("ERR not", "ERR already")),
    ("calls misuse an unknown command", Write("ERR usage", "ERR unknown-command")),
    ("forgets the CR", Write("\r", "")),
    ("writes counts with leading zeros", Write(" 2", " 02")),
    ("answers no telnet command", Change("", |line| if line[0] == 255 { Vec::new() } else { line.to_vec() })),
    ("takes every packet for a line", ToServer(|piece| match piece.last() {
        Some(b'\n') => piece.to_vec(),
        _ => [piece, b"\n"].concat(),
    })),
    ("carries out one line of each packet", ToServer(|piece| {
        piece.split_inclusive(|&byte| byte == b'\n').next().unwrap_or_default().to_vec()
    })),
    ("does not understand a telnet command that comes in two packets", ToServer(|piece| {
        piece.strip_suffix(&[255]).unwrap_or(piece).to_vec()
    })),
    ("accepts a verb in Unicode's upper case", ToServer(|piece| {
        text(piece, |text| text.replace('\u{17f}', "S").replace('\u{131}', "I"))
    })),
    ("takes a CR anywhere for a line's end", ToServer(|piece| {
        piece.iter().map(|&byte| if byte == b'\r' { b'\n' } else { byte }).collect()
    })),
    ("does not erase", ToServer(|piece| {
        piece.iter().copied().filter(|byte| !matches!(byte, 8 | 127)).collect()
    })),
    ("removes the spaces at the end of a line", ToServer(|piece| text(piece, |text| text.replace(" \n", "\n")))),
    ("discards the pending output of a half-closed client", ForgetHalfClosed),
    ("does not close after QUIT", NeverClose),
];

/// The clients that are connected through one proxy: where their lines go, and their names, which
/// are empty before WELCOME.
type Everybody = Arc<Mutex<Vec<(TcpStream, String)>>>;

pub struct Proxy {
    rule: Rule,
    everybody: Everybody,
}

impl Proxy {
    pub fn new(fault: &Fault) -> Proxy {
        Proxy { rule: fault.1, everybody: Everybody::default() }
    }

    /// Connects to the server through the proxy.
    pub fn connect(&self, address: &str) -> io::Result<TcpStream> {
        let server = TcpStream::connect(address)?;
        server.set_nodelay(true)?;
        let (near, far) = pair()?;
        let (rule, to_server, to_client) = (self.rule, server.try_clone()?, far.try_clone()?);
        let mut everybody = self.everybody.lock().unwrap();
        let crossing = Crossing {
            rule,
            id: everybody.len(),
            everybody: self.everybody.clone(),
            previous: Vec::new(),
            delayed: Vec::new(),
        };
        everybody.push((far.try_clone()?, String::new()));
        thread::spawn(move || carry_requests(rule, far, to_server));
        thread::spawn(move || crossing.carry_lines(server, to_client));
        Ok(near)
    }
}

/// Passes on what a client sends, until it ends its side.
fn carry_requests(rule: Rule, client: TcpStream, server: TcpStream) {
    carry(&client, &server, |piece| match rule {
        ToServer(change) => change(piece),
        _ => piece.to_vec(),
    });
    if let ForgetHalfClosed = rule {
        let _ = client.shutdown(Shutdown::Both);
    }
    let _ = server.shutdown(Shutdown::Write);
}

/// The length of the first line or telnet command, which no line ending follows.
fn whole_part(pending: &[u8]) -> Option<usize> {
    match pending {
        [255, _, _, ..] => Some(3),
        _ => pending.iter().position(|&byte| byte == b'\n').map(|end| end + 1),
    }
}

/// One client's connection, as the server's lines cross the proxy.
struct Crossing {
    rule: Rule,
    id: usize,
    everybody: Everybody,
    /// The line that crossed before.
    previous: Vec<u8>,
    delayed: Vec<u8>,
}

impl Crossing {
    /// Passes on what the server sends, until it ends its side.
    fn carry_lines(mut self, server: TcpStream, client: TcpStream) {
        let mut pending = Vec::new();
        carry(&server, &client, |piece| {
            pending.extend(piece);
            let mut sent = Vec::new();
            while let Some(end) = whole_part(&pending) {
                let line: Vec<u8> = pending.drain(..end).collect();
                sent.extend(self.sent_for(&line));
                self.previous = line;
            }
            sent
        });
        if !matches!(self.rule, NeverClose) {
            let _ = client.shutdown(Shutdown::Write);
        }
        let _ = server.shutdown(Shutdown::Both);
    }

    /// What is sent to a client for a line from the server.
    fn sent_for(&mut self, line: &[u8]) -> Vec<u8> {
        let mut everybody = self.everybody.lock().unwrap();
        if starts(line, "WELCOME ") {
            everybody[self.id].1 = words(line).swap_remove(1);
        }
        let previous = String::from_utf8_lossy(&self.previous);
        let sent = match self.rule {
            Lose(start, before) if starts(line, start) && previous.contains(before) => Vec::new(),
            Write(from, to) => replace(line, from, to),
            Change(start, change) if starts(line, start) => change(line),
            Delay(start) if starts(line, start) => {
                self.delayed.extend(line);
                return Vec::new();
            }
            Leak(start, is_meant) if starts(line, start) => {
                let from = words(line).swap_remove(1);
                for (id, (client, name)) in everybody.iter_mut().enumerate() {
                    if id != self.id && is_meant(name, &from) {
                        let _ = client.write_all(line);
                    }
                }
                line.to_vec()
            }
            _ => line.to_vec(),
        };
        [sent, std::mem::take(&mut self.delayed)].concat()
    }
}
