//! One transcript being played: the server, the clients, and what each client has received. No client
//! may receive a line that is not in the transcript. That is proved by order, never by waiting.
//!
//! A fence is a PING whose PONG is awaited. When the PONG comes, the server has processed all earlier
//! requests of this client, and the client has received all earlier lines. So before a client acts,
//! the others that have sent something pass a fence. At the end all clients pass two: after the first
//! all requests have been processed, and their effects must arrive before the second PONG.

use crate::broken::Proxy;
use crate::client::{self, Client, Via, SLICE};
use crate::forms::{Action, Step};
use crate::probe;
use crate::process::Server;
use crate::rules;
use crate::script::Script;
use crate::target::Target;
use crate::text::{show, side_by_side, Pattern};
use std::net::TcpListener;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// Times that another client is served before a server is said to leave something out.
const OTHERS_SERVED: usize = 3;
/// A client without a name, which receives nothing but HELLO.
const BYSTANDER: &str = "the bystander";

pub struct Session<'a> {
    pub target: &'a Target,
    address: String,
    pub server: Option<Server>,
    /// `Some` where the suite itself is the server.
    pub listener: Option<TcpListener>,
    proxy: Option<Proxy>,
    pub clients: Vec<Client>,
    fences: u32,
    /// The client that sent last, and what.
    sent_last: Option<(String, Vec<u8>)>,
    /// Lines that a client which has fallen behind has not received yet.
    pub told: Vec<String>,
    /// When a client last connected or sent something.
    pub last_act: Instant,
    /// Something may come later than a fence shows: after a time-out, a signal, the end of a connection,
    /// or from another program.
    pub is_loose: bool,
    pub is_stopping: bool,
    watches_console: bool,
}

impl<'a> Session<'a> {
    pub fn begin(target: &'a Target, script: &Script) -> Result<Session<'a>, String> {
        let (mut server, mut listener) = (None, None);
        let address = match &target.server {
            _ if script.suite_is_server => {
                let own = TcpListener::bind("127.0.0.1:0").map_err(|error| error.to_string())?;
                listener.insert(own).local_addr().map_err(|error| error.to_string())?.to_string()
            }
            Some(address) => {
                probe::wait_until_empty(address)
                    .inspect_err(|_| target.timeouts.is_over.store(true, Ordering::Relaxed))?;
                address.clone()
            }
            None => server.insert(Server::start(&script.options)?).address.clone(),
        };
        let mut session = Session {
            target,
            address,
            server,
            listener,
            proxy: target.fault.map(Proxy::new),
            clients: Vec::new(),
            fences: 0,
            sent_last: None,
            told: Vec::new(),
            last_act: Instant::now(),
            is_loose: !script.options.is_empty(),
            is_stopping: false,
            watches_console: script.steps.iter().any(|step| step.action == Action::Console),
        };
        // The transcript counts neither connections nor lines of the console.
        let is_free = script.options.is_empty() && !script.is_slow && !script.suite_is_server;
        if is_free && !session.watches_console {
            session.connect(BYSTANDER)?;
            session.look_for_greeting(BYSTANDER)?;
        }
        Ok(session)
    }

    /// Returns an error if the run is over.
    pub fn goes_on(&self) -> Result<(), String> {
        self.target.is_exhausted().map_or(Ok(()), |why| Err(why.to_owned()))
    }

    pub fn connect(&mut self, name: &str) -> Result<(), String> {
        let alone = |socket| (socket, Vec::new());
        let transport = match (self.target.via.filter(|_| name != BYSTANDER), &self.proxy) {
            (Some(via), _) => via.connect(&self.address),
            (None, Some(proxy)) => proxy.connect(&self.address).map(alone),
            (None, None) => client::connect(&self.address).map(alone),
        };
        let transport =
            transport.map_err(|error| format!("cannot connect to {}: {error}", self.address))?;
        self.clients.push(Client::new(name, transport, false));
        self.last_act = Instant::now();
        Ok(())
    }

    /// A step's text with everything filled in.
    pub fn pattern(&self, step: &Step) -> Result<Pattern, String> {
        Pattern::parse(&step.text, &|known| match known.strip_suffix("'s address") {
            None => Some(self.address.clone().into_bytes()),
            Some(name) => self.address_of(name),
        })
    }

    /// The same for a text without `*`.
    pub fn bytes(&self, step: &Step) -> Result<Vec<u8>, String> {
        Ok(self.pattern(step)?.0.concat())
    }

    /// Where a client's connection comes from, as the server sees it; `None` behind a proxy or
    /// another program.
    fn address_of(&self, name: &str) -> Option<Vec<u8>> {
        let client = self.clients.iter().find(|client| client.name == name)?;
        let is_direct = self.proxy.is_none() && self.target.via.is_none();
        is_direct.then(|| Some(client.socket.local_addr().ok()?.to_string().into_bytes()))?
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
        self.last_act = Instant::now();
        Ok(())
    }

    /// Sends from a client; the others pass their fences first.
    pub fn send(&mut self, name: &str, bytes: &[u8]) -> Result<(), String> {
        self.fence_all_but(name)?;
        self.transmit(name, bytes)?;
        // When the bystander has been served, the server has read this part of a line.
        let has_bystander = self.clients.iter().any(|client| client.name == BYSTANDER);
        match has_bystander && !bytes.ends_with(b"\n") {
            true => self.fence(BYSTANDER).map(drop),
            false => Ok(()),
        }
    }

    /// Takes the next line and compares it.
    pub fn look_for(&mut self, name: &str, expected: &Pattern) -> Result<(), String> {
        let line = loop {
            let client = self.find(name)?;
            if let Some(line) = client.take_line() {
                break client.without_ending(&line).to_vec();
            } else if client.is_closed {
                let received = format!("{}, [closed]", client.unread());
                return Err(side_by_side(&expected.show(), &received));
            }
            self.read_more(name).map_err(|what| side_by_side(&expected.show(), &what))?;
        };
        expected.compare(&line)?;
        match self.find(name)?.is_ours {
            true => Ok(()),
            false => rules::check(&line),
        }
    }

    pub fn expect(&mut self, name: &str, line: &str) -> Result<(), String> {
        self.look_for(name, &Pattern(vec![line.as_bytes().to_vec()]))
    }

    pub fn look_for_greeting(&mut self, name: &str) -> Result<(), String> {
        self.look_for(name, &Pattern(vec![b"HELLO linechat/1 ".to_vec(), Vec::new()]))
    }

    pub fn nothing_unread(&mut self, name: &str) -> Result<(), String> {
        let client = self.find(name)?;
        match client.received().is_empty() {
            true => Ok(()),
            false => Err(format!("{name} received too much: {}", client.unread())),
        }
    }

    /// No client may have received more than what the transcript says.
    pub fn end(&mut self) -> Result<(), String> {
        self.fence_all()?;
        self.fence_all()?;
        self.names(|_| true).iter().try_for_each(|name| self.end_of(name))?;
        self.end_of_server()
    }

    fn end_of(&mut self, name: &str) -> Result<(), String> {
        let is_stopping = self.is_stopping;
        let client = self.find(name)?;
        if client.is_exempt || name == BYSTANDER && is_stopping {
            return Ok(());
        }
        if client.has_half_closed {
            let end = self.read_to_end(name);
            end.map_err(|what| format!("{name} is still connected, and has unread: {what}"))?;
        }
        self.nothing_unread(name)?;
        let client = self.find(name)?;
        if client.is_closed && !client.has_half_closed {
            return Err(format!("the server has closed the connection of {name}"));
        }
        match client.is_ours {
            true => Err(format!("the transcript does not say how {name} exits")),
            false => Ok(()),
        }
    }

    fn end_of_server(&mut self) -> Result<(), String> {
        let Some(server) = &mut self.server else { return Ok(()) };
        if server.child.try_wait().is_ok_and(|ended| ended.is_none()) {
            let _ = server.child.kill();
        } else if !server.child.wait().is_ok_and(|ended| ended.success()) {
            return Err(format!("the server has ended: {}", server.complaints()));
        }
        let limit = self.target.timeouts.program();
        if self.watches_console {
            if let Some(line) = server.next_line_within(limit)? {
                return Err(format!("the console shows one more line: {line}"));
            }
        }
        match server.complaints() {
            complaints if complaints.is_empty() => Ok(()),
            complaints => Err(format!("the server complains: {complaints}")),
        }
    }

    /// What was sent last, and what each client has not read.
    pub fn situation(&self) -> String {
        let mut text = String::new();
        if let Some((name, bytes)) = &self.sent_last {
            text += &format!("\n          sent last: {name} >> {}", show(bytes));
        }
        for client in self.clients.iter().filter(|client| !client.received().is_empty()) {
            text += &format!("\n          {} has unread: {}", client.name, client.unread());
        }
        text
    }

    /// Passes a fence for every client that has sent something, except one.
    pub fn fence_all_but(&mut self, name: &str) -> Result<(), String> {
        let owing = self.names(|client| client.owes_fence && client.name != name);
        owing.iter().try_for_each(|name| self.fence(name).map(drop))
    }

    pub fn fence_all(&mut self) -> Result<(), String> {
        self.names(|_| true).iter().try_for_each(|name| self.fence(name).map(drop))
    }

    fn names(&self, is_meant: impl Fn(&Client) -> bool) -> Vec<String> {
        let clients = self.clients.iter().filter(|client| is_meant(client));
        clients.map(|client| client.name.clone()).collect()
    }

    /// Passes a fence, if this client can. Returns true if anything came before its PONG.
    pub fn fence(&mut self, name: &str) -> Result<bool, String> {
        self.goes_on()?;
        let timeouts = &self.target.timeouts;
        let fence = format!("fence-{}", self.fences + 1);
        let client = self.find(name)?;
        if !client.can_pass_fence() {
            return Ok(false);
        }
        let (before, pong) = (client.received().len(), format!("PONG {fence}"));
        client.send(format!("PING {fence}\n").as_bytes());
        self.fences += 1;
        let (sent, mut searched, mut progress) = (Instant::now(), 0, Instant::now());
        loop {
            self.goes_on()?;
            let client = self.find(name)?;
            if let Some(found) = client.take_pong(&pong, &mut searched) {
                // A PONG after other output does not show how busy the server is.
                if found == before {
                    timeouts.saw_pong_after(sent.elapsed());
                }
                return Ok(found > before);
            } else if client.is_closed {
                return Ok(true);
            } else if client.read(SLICE) {
                progress = Instant::now();
            } else if progress.elapsed() > timeouts.server() {
                return Err(format!(
                    "{name} sent PING {fence} (the suite's own check that nothing is missing) and no \
                     PONG came; {name} has unread: {}",
                    client.unread()
                ));
            }
        }
    }

    /// Waits for something more, or the end. If neither comes, the error is what is unread.
    pub fn read_more(&mut self, name: &str) -> Result<(), String> {
        // nc does not tell of a PING that met a closed connection, so it gets more time before one.
        let first = self.target.via.map_or(SLICE, |_| self.target.timeouts.server());
        let before = self.find(name)?.received().len();
        if self.find(name)?.read(first) {
            return Ok(());
        }
        self.fence_all_but(name)?;
        if self.fence(name)? {
            return Ok(());
        }
        // What a client sent that can pass no fence may not have been processed yet.
        let is_loose =
            self.is_loose || self.clients.iter().any(|it| it.owes_fence && !it.can_pass_fence());
        let client = self.find(name)?;
        if !is_loose && client.can_pass_fence() {
            return Err(client.unread());
        }
        // It may have come right after the PONG.
        let has_come = |client: &mut Client| client.received().len() > before || client.read(SLICE);
        let since = Instant::now();
        while !has_come(self.find(name)?) {
            self.goes_on()?;
            // Serving another client shows how slow the server is now.
            if since.elapsed() > self.timeout() {
                self.serve_others(name)?;
                if since.elapsed() > self.timeout() && !has_come(self.find(name)?) {
                    return Err(self.find(name)?.unread());
                }
            }
        }
        Ok(())
    }

    /// How long to wait for what no fence tells of.
    fn timeout(&self) -> Duration {
        let has_program = self.target.via.is_some() || self.clients.iter().any(|it| it.is_ours);
        match has_program {
            true => self.target.timeouts.program(),
            false => self.target.timeouts.server(),
        }
    }

    /// Another client, if one can, passes several fences.
    pub fn serve_others(&mut self, name: &str) -> Result<(), String> {
        let others = self.names(|client| client.name != name && client.can_pass_fence());
        let Some(other) = others.first() else { return Ok(()) };
        (0..OTHERS_SERVED).try_for_each(|_| self.fence(other).map(drop))
    }

    /// Waits until the server has ended the connection.
    pub fn await_end(&mut self, name: &str) -> Result<(), String> {
        let is_nc = self.target.via == Some(Via::Nc);
        let client = self.find(name)?;
        client.is_exempt = true;
        if is_nc && !client.has_half_closed {
            // nc goes on until its input ends, too. If the connection is still open, the answer to this
            // arrives first, which fails the step.
            client.send(b"PING\n");
            client.end_input();
        }
        let end = self.read_to_end(name);
        end.map_err(|what| side_by_side("[closed]", &format!("{what}, and it is open")))
    }

    pub fn read_to_end(&mut self, name: &str) -> Result<(), String> {
        while !self.find(name)?.is_closed {
            self.read_more(name)?;
        }
        Ok(())
    }
}
