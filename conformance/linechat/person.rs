//! Somebody in the room, as the tests of this server and client need them: connects, joins, says
//! lines, and reads what the server says.

// Each of the programs that include this file uses a part of it.
#![allow(dead_code)]

use crate::process::STUCK;
use std::io::{self, BufRead, BufReader, Write};
use std::net::TcpStream;

/// A connection to the server. It waits for what it reads, at most until it is plainly stuck; its
/// `socket` may be made not to wait.
///
/// Where it comes from is chosen by where it goes to: the kernel takes for both ends the address
/// that the server is reached at, when that is one of this machine's own (ip-route(8), `src`).
pub struct Person {
    reader: BufReader<TcpStream>,
    /// The beginning of a line whose end has not come yet.
    unfinished: Vec<u8>,
    fences: u32,
}

impl Person {
    /// Connects to HOST:PORT.
    pub fn connect(address: &str) -> Person {
        let socket = TcpStream::connect(address).expect("connects");
        socket.set_nodelay(true).expect("no delay");
        socket.set_read_timeout(Some(STUCK)).expect("a time-out");
        Person { reader: BufReader::new(socket), unfinished: Vec::new(), fences: 0 }
    }

    /// Connects and joins, and forgets what is said of it.
    pub fn join(address: &str, name: &str) -> Person {
        let mut person = Person::connect(address);
        person.say(&format!("NAME {name}"));
        person.until("WELCOME ");
        person
    }

    pub fn socket(&mut self) -> &mut TcpStream {
        self.reader.get_mut()
    }

    /// A second handle to the socket, for another thread.
    pub fn voice(&self) -> TcpStream {
        self.reader.get_ref().try_clone().expect("a second handle")
    }

    pub fn say(&mut self, line: &str) {
        self.socket().write_all(format!("{line}\n").as_bytes()).expect("the server takes a line");
    }

    /// The next line without its ending, or nothing at the end of the stream. If the socket does
    /// not wait, `WouldBlock` is the error when no whole line is there.
    pub fn next(&mut self) -> io::Result<Option<String>> {
        self.reader.read_until(b'\n', &mut self.unfinished)?;
        let line = String::from_utf8(std::mem::take(&mut self.unfinished)).expect("UTF-8");
        // Whoever is removed as slow is cut off, if need be in the middle of a line.
        let Some(line) = line.strip_suffix('\n') else { return Ok(None) };
        Ok(Some(line.strip_suffix('\r').expect("lines end with CR LF").to_owned()))
    }

    pub fn line(&mut self) -> String {
        self.next().expect("a line in time").expect("a line, not the end")
    }

    /// Reads up to the first line that starts so, and returns it.
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
        self.fences += 1;
        let token = format!("fence {}", self.fences);
        self.say(&format!("PING {token}"));
        let mut lines = Vec::new();
        loop {
            match self.line() {
                line if line == format!("PONG {token}") => return lines,
                line => lines.push(line),
            }
        }
    }

    /// How many are in the room by the newest roster, and all lines that came before it was known.
    pub fn count(&mut self) -> (usize, Vec<String>) {
        self.say("LIST");
        let lines = self.fence();
        let roster = lines.iter().rfind(|line| line.starts_with("USERS ")).expect("a roster");
        let count = roster.split(' ').nth(1).and_then(|count| count.parse().ok());
        (count.expect("a count"), lines)
    }

    /// Whether the server has refused the connection as one too many.
    pub fn is_refused(&mut self) -> bool {
        match self.line() {
            line if line.starts_with("HELLO ") => false,
            line => {
                assert!(line.starts_with("ERR full "), "{line}");
                true
            }
        }
    }

    /// Whether the server has closed the connection: reads to its end.
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
