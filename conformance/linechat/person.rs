//! A client as the tests of this server need it: it connects, joins, says lines, and reads what the
//! server sends.

// Each of the programs that include this file uses a part of it.
#![allow(dead_code)]

use crate::process::{Server, STUCK};
use std::io::{self, BufRead, BufReader, Write};
use std::net::TcpStream;

/// Starts the server on a free port.
pub fn start(options: &str) -> Server {
    let options: Vec<_> = options.split_whitespace().map(str::to_owned).collect();
    Server::start(&options).expect("the server starts")
}

/// A connection to the server. Reads block for `STUCK` at most, unless its `socket` is made
/// non-blocking.
///
/// The kernel takes the server's address for both ends if it is one of this machine's own
/// (ip-route(8), `src`). So the address that is connected to decides where the client comes from.
pub struct Person {
    reader: BufReader<TcpStream>,
    /// The beginning of a line whose end has not come yet.
    unfinished: Vec<u8>,
}

impl Person {
    /// Connects to HOST:PORT.
    pub fn connect(address: &str) -> Person {
        let socket = TcpStream::connect(address).expect("connects");
        socket.set_nodelay(true).expect("no delay");
        socket.set_read_timeout(Some(STUCK)).expect("a time-out");
        Person { reader: BufReader::new(socket), unfinished: Vec::new() }
    }

    /// Connects, joins, and reads up to its WELCOME.
    pub fn join(address: &str, name: &str) -> Person {
        let mut person = Person::connect(address);
        person.say(&format!("NAME {name}"));
        person.until("WELCOME ");
        person
    }

    pub fn socket(&mut self) -> &mut TcpStream {
        self.reader.get_mut()
    }

    pub fn say(&mut self, line: &str) {
        self.socket().write_all(format!("{line}\n").as_bytes()).expect("the server takes a line");
    }

    /// The next line without its ending; `None` at the end of the stream, which may come in the
    /// middle of a line. If no whole line is there, a non-blocking socket returns `WouldBlock`.
    pub fn next(&mut self) -> io::Result<Option<String>> {
        self.reader.read_until(b'\n', &mut self.unfinished)?;
        let line = String::from_utf8(std::mem::take(&mut self.unfinished)).expect("UTF-8");
        let Some(line) = line.strip_suffix('\n') else { return Ok(None) };
        Ok(Some(line.strip_suffix('\r').expect("lines end with CR LF").to_owned()))
    }

    pub fn line(&mut self) -> String {
        self.next().expect("a line in time").expect("a line, not the end")
    }

    /// Reads up to the first line that starts like this, and returns it.
    pub fn until(&mut self, start: &str) -> String {
        loop {
            let line = self.line();
            if line.starts_with(start) {
                return line;
            }
        }
    }

    /// Returns the lines that come before the PONG of a PING sent now.
    pub fn fence(&mut self) -> Vec<String> {
        self.say("PING fence");
        let mut lines = Vec::new();
        loop {
            match self.line() {
                line if line == "PONG fence" => return lines,
                line => lines.push(line),
            }
        }
    }

    /// Returns true if the server has no space for the connection, false if it says HELLO.
    pub fn is_refused(&mut self) -> bool {
        let line = self.line();
        let is_refused = line.starts_with("ERR full ");
        assert!(is_refused || line.starts_with("HELLO "), "{line}");
        is_refused
    }

    /// Reads to the end of the stream. Returns false if it does not come in time.
    pub fn ends(mut self) -> bool {
        loop {
            match self.next() {
                Ok(Some(_)) => {}
                Ok(None) => return true,
                Err(error) => return error.kind() == io::ErrorKind::ConnectionReset,
            }
        }
    }

    pub fn leave(mut self) {
        self.say("QUIT");
        assert!(self.ends());
    }
}
