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

/// A connection to the server. Reads block for `STUCK` at most.
pub struct Person(BufReader<TcpStream>);

impl Person {
    /// Connects to HOST:PORT.
    pub fn connect(address: &str) -> Person {
        let socket = TcpStream::connect(address).expect("connects");
        socket.set_nodelay(true).expect("no delay");
        socket.set_read_timeout(Some(STUCK)).expect("a time-out");
        Person(BufReader::new(socket))
    }

    /// Connects, joins, and reads up to its WELCOME.
    pub fn join(address: &str, name: &str) -> Person {
        let mut person = Person::connect(address);
        person.say(&format!("NAME {name}"));
        person.until("WELCOME ");
        person
    }

    pub fn socket(&mut self) -> &mut TcpStream {
        self.0.get_mut()
    }

    pub fn say(&mut self, line: &str) {
        self.socket().write_all(format!("{line}\n").as_bytes()).expect("the server takes a line");
    }

    /// The next line without its ending; `None` at the end of the stream, which may come in the
    /// middle of a line.
    pub fn next(&mut self) -> io::Result<Option<String>> {
        let mut line = String::new();
        self.0.read_line(&mut line)?;
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
        std::iter::repeat_with(|| self.line()).take_while(|line| line != "PONG fence").collect()
    }

    /// Returns true if the server has no space for the connection, false if it says HELLO.
    pub fn is_refused(&mut self) -> bool {
        let line = self.line();
        let is_refused = line.starts_with("ERR full ");
        assert!(is_refused || line.starts_with("HELLO "), "{line}");
        is_refused
    }

    /// Returns all lines up to the end of the stream.
    pub fn rest(mut self) -> Vec<String> {
        let lines = std::iter::from_fn(|| self.next().transpose()).collect::<io::Result<_>>();
        lines.expect("everything in time, then the end and no reset")
    }

    pub fn leave(mut self) {
        self.say("QUIT");
        self.rest();
    }
}
