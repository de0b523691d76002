//! One transcript being played: the server, the clients, and what everybody has received. Nobody may
//! receive a line that the transcript does not say, which is proved by order, never by waiting.
//!
//! A fence is a PING whose PONG is awaited: when it comes, the server has dealt with all that this
//! client had sent before, and has sent before it all that it owed to this client. So before a client
//! acts, the others that have sent something pass a fence, and at the end everybody passes two: after
//! the first, all requests are dealt with; whatever they caused must arrive before the second PONG.

use crate::broken::Standing;
use crate::client::{self, Client, Kind, Transport, Via, SLICE};
use crate::forms::{Action, Step};
use crate::probe;
use crate::process::Server;
use crate::rules;
use crate::script::Script;
use crate::target::Target;
use crate::text::{self, show, side_by_side, Pattern, Text};
use std::net::TcpListener;
use std::time::{Duration, Instant};

/// Bytes before a PONG, from which on it tells nothing of how busy everything is.
const MUCH_ELSE: usize = 4096;
/// Times that another client is served before a server is said to leave something out.
const OTHERS_SERVED: usize = 3;
/// How many clients are shown with what they received, when something went wrong.
const CLIENTS_SHOWN: usize = 3;

/// A step, and the round of its block in which it is played.
#[derive(Clone, Copy)]
pub struct Played<'a> {
    pub step: &'a Step,
    pub round: usize,
}

pub struct Session<'a> {
    pub target: &'a Target,
    address: String,
    pub server: Option<Server>,
    /// `Some` where the suite itself is the server.
    pub listener: Option<TcpListener>,
    _proxy: Option<Standing>,
    pub clients: Vec<Client>,
    fences: u32,
    /// The client that sent last, and what.
    sent_last: Option<(String, Vec<u8>)>,
    /// Lines that a client which has fallen behind has not received yet.
    pub told: Vec<Pattern>,
    /// When something was last done.
    pub last_act: Instant,
    /// Things may happen that no fence waits for: a time-out, a signal, another program.
    pub is_loose: bool,
    pub is_stopping: bool,
    watches_console: bool,
    /// Why it is not played to its end; `None` if it is.
    pub stopped: Option<&'static str>,
}

impl<'a> Session<'a> {
    pub fn begin(target: &'a Target, script: &Script) -> Result<Session<'a>, String> {
        if let (Some(address), false) = (&target.server, script.is_apart()) {
            probe::wait_until_empty(address).inspect_err(|_| target.timeouts.end())?;
        }
        let listener = script.suite_is_server.then(|| TcpListener::bind("127.0.0.1:0"));
        let listener = listener.transpose().map_err(|error| error.to_string())?;
        let own_address = listener.as_ref().and_then(|listener| listener.local_addr().ok());
        let (server, mut address) = match (&target.server, own_address) {
            (_, Some(address)) => (None, address.to_string()),
            (Some(address), None) => (None, address.clone()),
            (None, None) => {
                let server = Server::start(&script.options)?;
                let address = server.address.clone();
                (Some(server), address)
            }
        };
        let proxy = target.proxy.as_ref().filter(|_| listener.is_none());
        let proxy = proxy.map(|proxy| proxy.in_front_of(&address)).transpose();
        let proxy = proxy.map_err(|error| error.to_string())?;
        if let Some(proxy) = &proxy {
            address = proxy.address.clone();
        }
        let mut session = Session {
            target,
            address,
            server,
            listener,
            _proxy: proxy,
            clients: Vec::new(),
            fences: 0,
            sent_last: None,
            told: Vec::new(),
            last_act: Instant::now(),
            is_loose: !script.options.is_empty(),
            is_stopping: false,
            watches_console: script.does(Action::Console),
            stopped: None,
        };
        // A client that nothing concerns, where neither connections nor the console are counted.
        let is_free = script.options.is_empty() && !script.is_slow && !script.suite_is_server;
        if is_free && !session.watches_console {
            session.connect("the bystander", Kind::Bystander)?;
            session.look_for("the bystander", &greeting())?;
        }
        Ok(session)
    }

    /// An error if nothing more is to be played.
    pub fn goes_on(&mut self) -> Result<(), String> {
        self.stopped = self.target.is_exhausted();
        match self.stopped {
            Some(why) => Err(why.to_owned()),
            None => Ok(()),
        }
    }

    pub fn connect(&mut self, name: &str, kind: Kind) -> Result<(), String> {
        let (host, port) = self.address.rsplit_once(':').ok_or("the server is HOST:PORT")?;
        let via = if kind == Kind::Scripted { self.target.via } else { Via::Sockets };
        let transport = match via {
            Via::Sockets => client::socket(&self.address)?,
            Via::Nc => client::nc(host, port)?,
            Via::Telnet => client::telnet(host, port)?,
        };
        let ending = if via == Via::Telnet { "\n" } else { "\r\n" };
        self.clients.push(Client::new(name, kind, transport, ending));
        match via {
            Via::Telnet => self.skip_telnet_greeting(name),
            _ => Ok(()),
        }
    }

    /// Takes away what telnet says for itself before the server's first line.
    fn skip_telnet_greeting(&mut self, name: &str) -> Result<(), String> {
        let last = b"Escape character is 'off'.\n";
        let since = Instant::now();
        loop {
            self.goes_on()?;
            let limit = self.target.timeouts.program();
            let client = self.find(name)?;
            let received = &client.received;
            if let Some(at) = received.windows(last.len()).position(|window| window == last) {
                client.received.take(at + last.len());
                return Ok(());
            }
            if client.is_closed || since.elapsed() > limit {
                return Err(format!("telnet does not connect: {}", client.unread()));
            }
            client.read(SLICE);
        }
    }

    /// A step's text with everything filled in.
    pub fn pattern(&self, played: Played) -> Pattern {
        self.fill_in(&played.step.text, played.round)
    }

    /// The same where nothing is left open.
    pub fn bytes(&self, played: Played) -> Vec<u8> {
        self.pattern(played).0.concat()
    }

    fn fill_in(&self, text: &Text, round: usize) -> Pattern {
        let mut pieces = vec![Vec::new()];
        for part in &text.0 {
            let known = match part {
                text::Part::Bytes(bytes) => Some(bytes.clone()),
                text::Part::Round => Some(round.to_string().into_bytes()),
                text::Part::Server => Some(self.address.clone().into_bytes()),
                text::Part::AddressOf(name) => self.address_of(name),
                text::Part::Anything => None,
            };
            match (known, pieces.last_mut()) {
                (Some(bytes), Some(piece)) => piece.extend(bytes),
                _ => pieces.push(Vec::new()),
            }
        }
        Pattern(pieces)
    }

    /// Where a client's connection comes from, as the server sees it; `None` behind a proxy or
    /// another program.
    fn address_of(&self, name: &str) -> Option<Vec<u8>> {
        let client = self.clients.iter().find(|client| client.name == name)?;
        match &client.transport {
            Transport::Socket(socket) if self.target.proxy.is_none() => {
                Some(socket.local_addr().ok()?.to_string().into_bytes())
            }
            _ => None,
        }
    }

    pub fn find(&mut self, name: &str) -> Result<&mut Client, String> {
        let client = self.clients.iter_mut().find(|client| client.name == name);
        client.ok_or(format!("{name} is not connected"))
    }

    pub fn forget(&mut self, name: &str) {
        self.clients.retain(|client| client.name != name);
    }

    /// Sends from a client at once.
    pub fn transmit(&mut self, name: &str, bytes: &[u8]) -> Result<(), String> {
        self.find(name)?.send(bytes);
        self.sent_last = Some((name.to_owned(), bytes.to_vec()));
        Ok(())
    }

    /// Sends from a client; the others pass their fences first.
    pub fn send(&mut self, name: &str, bytes: &[u8]) -> Result<(), String> {
        self.fence_all_but(name)?;
        self.transmit(name, bytes)?;
        // A part of a line is read before the next one comes: a bystander has been served since.
        let other = |client: &Client| client.kind == Kind::Bystander;
        match self.clients.iter().position(other).filter(|_| !bytes.ends_with(b"\n")) {
            Some(bystander) => self.fence_at(bystander).map(drop),
            None => Ok(()),
        }
    }

    /// Takes the next line and compares it.
    pub fn look_for(&mut self, name: &str, expected: &Pattern) -> Result<(), String> {
        let line = loop {
            let client = self.find(name)?;
            if let Some(line) = client.take_line() {
                break line;
            }
            if client.is_closed {
                let received = format!("{}[closed]", client.unread());
                return Err(side_by_side(&expected.show(), &received));
            }
            if let Err(what) = self.read_more(name) {
                return Err(side_by_side(&expected.show(), &what));
            }
        };
        let client = self.find(name)?;
        let text = client.without_ending(&line).to_vec();
        if !expected.matches(&text) {
            return Err(side_by_side(&expected.show(), &show(&text)));
        }
        client.remember(&text);
        if text.starts_with(b"LEFT ") {
            client.awaited_leaves = client.awaited_leaves.saturating_sub(1);
        }
        match client.kind {
            Kind::Scripted => rules::check(&text),
            Kind::Ours | Kind::Bystander => Ok(()),
        }
    }

    pub fn nothing_unread(&mut self, name: &str) -> Result<(), String> {
        let client = self.find(name)?;
        match client.received.is_empty() {
            true => Ok(()),
            false => Err(format!("{name} received too much: {}", client.unread())),
        }
    }

    /// No client may have received more than what the transcript says.
    pub fn end(&mut self) -> Result<(), String> {
        self.fence_all()?;
        self.fence_all()?;
        let names: Vec<_> = self.clients.iter().map(|client| client.name.clone()).collect();
        names.iter().try_for_each(|name| self.end_of(name))?;
        self.end_of_server()
    }

    fn end_of(&mut self, name: &str) -> Result<(), String> {
        let is_stopping = self.is_stopping;
        let client = self.find(name)?;
        if client.is_stalled || client.kind == Kind::Bystander && is_stopping {
            return Ok(());
        }
        self.nothing_unread(name)?;
        let client = self.find(name)?;
        if client.is_closed && !(client.was_to_close || client.has_half_closed) {
            return Err(format!("the server has closed the connection of {name}"));
        }
        if client.kind == Kind::Ours {
            return Err(format!("the transcript does not say how {name} exits"));
        }
        while self.find(name)?.has_half_closed && !self.find(name)?.is_closed {
            self.read_more(name)?;
        }
        self.nothing_unread(name)
    }

    fn end_of_server(&mut self) -> Result<(), String> {
        let Some(server) = &mut self.server else { return Ok(()) };
        if server.child.try_wait().is_ok_and(|ended| ended.is_none()) {
            let _ = server.child.kill();
            self.no_more_on_the_console()?;
        } else if !server.child.wait().is_ok_and(|ended| ended.success()) {
            return Err(format!("the server has ended: {}", server.complaints()));
        }
        match self.server.as_mut().map(Server::complaints).unwrap_or_default() {
            complaints if complaints.is_empty() => Ok(()),
            complaints => Err(format!("the server complains: {complaints}")),
        }
    }

    pub fn no_more_on_the_console(&mut self) -> Result<(), String> {
        let limit = self.target.timeouts.program();
        match &mut self.server {
            Some(server) if self.watches_console => match server.next_line_within(limit)? {
                None => Ok(()),
                Some(line) => {
                    Err(format!("a line of the console that is not in the transcript: {line}"))
                }
            },
            _ => Ok(()),
        }
    }

    /// What was sent last, what these clients had received, and what every client has not read.
    pub fn history(&self, names: &[String]) -> String {
        let mut text = String::new();
        if let Some((name, bytes)) = &self.sent_last {
            text += &format!("\n          sent last: {name} >> {}", show(bytes));
        }
        let is_shown =
            |client: &&Client| names.contains(&client.name) && !client.history.is_empty();
        for client in self.clients.iter().filter(is_shown).take(CLIENTS_SHOWN) {
            text += &format!("\n          {} had received:", client.name);
            for line in &client.history {
                text += &format!("\n            {}", show(line));
            }
        }
        for client in self.clients.iter().filter(|client| !client.received.is_empty()) {
            text += &format!("\n          {} has unread: {}", client.name, client.unread());
        }
        text
    }

    /// Passes a fence for every client that has sent something, except one.
    pub fn fence_all_but(&mut self, name: &str) -> Result<(), String> {
        for at in 0..self.clients.len() {
            if self.clients[at].unfenced.is_some() && self.clients[at].name != name {
                self.fence_at(at)?;
            }
        }
        Ok(())
    }

    pub fn fence_all(&mut self) -> Result<(), String> {
        (0..self.clients.len()).try_for_each(|at| {
            self.goes_on()?;
            self.fence_at(at).map(drop)
        })
    }

    pub fn fence(&mut self, name: &str) -> Result<bool, String> {
        match self.clients.iter().position(|client| client.name == name) {
            Some(at) => self.fence_at(at),
            None => Err(format!("{name} is not connected")),
        }
    }

    /// Passes a fence, if this client can. Returns whether anything came before its PONG.
    fn fence_at(&mut self, at: usize) -> Result<bool, String> {
        let timeouts = &self.target.timeouts;
        let client = &mut self.clients[at];
        if !client.can_pass_fence() {
            return Ok(false);
        }
        let (before, ahead) = (client.received.len(), client.unfenced.unwrap_or(0));
        self.fences += 1;
        let pong = format!("PONG fence-{}", self.fences).into_bytes();
        client.send(format!("PING fence-{}\n", self.fences).as_bytes());
        let (sent, mut searched, mut progress) = (Instant::now(), 0, Instant::now());
        loop {
            self.goes_on()?;
            let client = &mut self.clients[at];
            if let Some(found) = client.take_pong(&pong, &mut searched)? {
                if found < MUCH_ELSE {
                    timeouts.saw_pong_after(sent.elapsed());
                }
                return Ok(found > before);
            }
            if client.is_closed {
                return Ok(true);
            }
            if client.read(SLICE) {
                progress = Instant::now();
                continue;
            }
            if progress.elapsed() > timeouts.pong_behind(ahead) {
                return Err(format!("{} gets no PONG; unread: {}", client.name, client.unread()));
            }
        }
    }

    /// Waits for something more to arrive. An error says that nothing will.
    pub fn read_more(&mut self, name: &str) -> Result<(), String> {
        // nc does not show that a fence met a closed connection, so it gets more time before one.
        let is_nc = self.target.via == Via::Nc;
        let first = if is_nc { SLICE * 50 } else { SLICE };
        let before = self.find(name)?.received.len();
        if self.find(name)?.read(first) {
            return Ok(());
        }
        self.fence_all_but(name)?;
        if self.fence(name)? {
            return Ok(());
        }
        // Something from a client that can pass no fence may still be on its way.
        let is_loose = self.is_loose
            || self.clients.iter().any(|it| it.unfenced.is_some() && !it.can_pass_fence());
        let client = self.find(name)?;
        let may_wait = is_loose || client.awaited_leaves > 0 || !client.can_pass_fence();
        // It may have come right behind the PONG.
        let has_come = may_wait && client.received.len() > before;
        match has_come || may_wait && self.await_more(name)? {
            true => Ok(()),
            false => Err(format!("nothing; unread: '{}'", self.find(name)?.unread())),
        }
    }

    /// Waits for something that no fence tells of. Returns false if it does not come in time.
    fn await_more(&mut self, name: &str) -> Result<bool, String> {
        let timeouts = &self.target.timeouts;
        let has_program = self.clients.iter().any(|client| client.kind == Kind::Ours);
        let is_greeted = self.find(name)?.is_greeted();
        let limit = || match is_greeted {
            _ if has_program => timeouts.program(),
            false => timeouts.pong_behind(0),
            true => timeouts.line(),
        };
        let since = Instant::now();
        loop {
            if self.find(name)?.read(SLICE) {
                return Ok(true);
            }
            self.goes_on()?;
            if since.elapsed() < limit() {
                continue;
            }
            // How slow everything is may have been learned only now.
            self.serve_others(name)?;
            if since.elapsed() > limit() {
                return Ok(self.find(name)?.read(Duration::from_millis(1)));
            }
        }
    }

    /// Another client passes several fences. Returns false if there is none that can.
    pub fn serve_others(&mut self, name: &str) -> Result<bool, String> {
        let other = |client: &Client| client.name != name && client.can_pass_fence();
        let Some(other) = self.clients.iter().position(other) else { return Ok(false) };
        (0..OTHERS_SERVED).try_for_each(|_| self.fence_at(other).map(drop))?;
        Ok(true)
    }

    /// Waits until the server has ended the connection.
    pub fn await_end(&mut self, name: &str) -> Result<(), String> {
        let is_nc = self.target.via == Via::Nc;
        let client = self.find(name)?;
        if is_nc && client.program().is_ok() {
            // nc waits for the end of what is typed, too. Were the connection still open, the answer
            // to this would be received before that ends it.
            client.send(b"PING\n");
            client.end_input();
        }
        client.read(SLICE);
        if !self.find(name)?.is_closed && self.closes_late(name)? {
            return Err(format!("{name}'s connection stays open, though others go on"));
        }
        while !self.find(name)?.is_closed {
            if !self.find(name)?.read(SLICE) && !self.await_more(name)? {
                return Err(format!("{name}'s connection is still open"));
            }
        }
        Ok(())
    }

    /// Our own server has ended a connection by the time that another client has passed several
    /// fences. Returns true if it should have but has not.
    fn closes_late(&mut self, name: &str) -> Result<bool, String> {
        if !self.target.is_plain() || self.target.proxy.is_some() || self.is_loose {
            return Ok(false);
        }
        if !self.serve_others(name)? {
            return Ok(false);
        }
        let client = self.find(name)?;
        while !client.is_closed && client.read(SLICE) {}
        Ok(!client.is_closed)
    }

    /// A client will be noticed to be gone, at a time that no fence tells.
    pub fn await_leave(&mut self) {
        self.clients.iter_mut().for_each(|client| client.awaited_leaves += 1);
    }
}

/// The first line of every server.
pub fn greeting() -> Pattern {
    Pattern(vec![b"HELLO linechat/1 ".to_vec(), Vec::new()])
}
