//! Plays a transcript: starts the server, the clients and whatever stands between them, takes one
//! step after the other, and sees to it that nobody receives a line that is not in the transcript.
//! The steps are in `steps.rs`, `pace.rs` and `terminal.rs`; how absence is proved, in `fences.rs`.

use crate::broken::Standing;
use crate::clients::{self, Client, Part, Via, SLICE};
use crate::grammar;
use crate::probe;
use crate::process::Server;
use crate::script::Script;
use crate::steps::{is_cast, Play, Role, Step};
use crate::text::{self, show, side_by_side, Pattern, Text};
use crate::theatre::{Outcome, Theatre, Way};
use std::net::TcpListener;
use std::time::{Duration, Instant};

/// PROTOCOL.md, "Limits".
pub const LONGEST_LINE: usize = 4096;
pub const LARGEST_PUSHED_ROSTER: usize = 100;

/// The first and last bytes of what is sent that arrive one by one, in the way that does that.
const CUT: usize = 32;
/// Bytes of one piece, in the way that sends everything in one: less than what replies may wait.
const PIECE: usize = 16 * 1024;

/// A step in its place among all that are played.
#[derive(Clone, Copy)]
pub struct Beat<'a> {
    pub step: &'a Step,
    /// The number of the round of its block.
    pub round: usize,
    at: usize,
}

pub struct Stage<'a> {
    pub theatre: &'a Theatre,
    way: Way,
    address: String,
    pub server: Option<Server>,
    /// Where the suite itself is the server.
    pub listener: Option<TcpListener>,
    _proxy: Option<Standing>,
    pub clients: Vec<Client>,
    pub fences: u32,
    beats: Vec<Beat<'a>>,
    /// Which steps have been sent together with an earlier one.
    said: Vec<bool>,
    /// Public lines that somebody has received, and who watches must have too.
    public: Vec<Vec<u8>>,
    /// What one who has fallen behind has not received yet.
    pub told: Vec<Pattern>,
    /// When something was last done.
    pub last_act: Instant,
    /// Things may happen that no fence waits for: a time-out, a signal, another program.
    pub is_loose: bool,
    pub is_stopping: bool,
    watches_console: bool,
    /// Why it is not played to its end, where it is not.
    stopped: Option<&'static str>,
}

impl<'a> Stage<'a> {
    /// In each of these ways, until one fails.
    pub fn play(theatre: &'a Theatre, script: &'a Script, ways: &[Way]) -> Outcome {
        if let Some(why) = theatre.misses(script) {
            return Outcome::Skipped(why);
        }
        for &way in ways {
            let mut stopped = None;
            let played = Stage::set(theatre, script, way).and_then(|mut stage| {
                let played = stage.play_once(script);
                stopped = stage.stopped;
                played
            });
            if let (Some(why), Err(_)) = (stopped, &played) {
                return Outcome::Skipped(why);
            }
            if let Err(error) = played {
                let how = match way {
                    Way::AsWritten => "",
                    Way::ByteByByte => "\n        when it is sent byte by byte, and one more is in the room",
                    Way::InOnePiece => "\n        when what somebody says is sent in one piece, and one more is in the room",
                };
                return Outcome::Failed(error + how);
            }
        }
        Outcome::Passed
    }

    fn play_once(&mut self, script: &Script) -> Result<(), String> {
        let file = script.name.split(':').next().unwrap_or_default();
        self.place_extras(script)?;
        (0..self.beats.len()).try_for_each(|at| self.step(file, self.beats[at]))?;
        let everybody: Vec<_> = self.clients.iter().map(|client| client.name.clone()).collect();
        self.end().map_err(|what| {
            let history = self.history(&everybody);
            format!("        at the end of {file}\n{}{history}", indent(&what))
        })
    }

    /// An error if nothing more is to be played.
    pub fn goes_on(&mut self) -> Result<(), String> {
        self.stopped = self.theatre.is_exhausted();
        match self.stopped {
            Some(why) => Err(why.to_owned()),
            None => Ok(()),
        }
    }

    fn set(theatre: &'a Theatre, script: &'a Script, way: Way) -> Result<Stage<'a>, String> {
        if let (Some(address), false) = (&theatre.server, script.is_apart()) {
            probe::wait_until_empty(address).map_err(|verdict| {
                theatre.patience.end();
                verdict.to_string()
            })?;
        }
        let listener = script.plays_server.then(|| TcpListener::bind("127.0.0.1:0"));
        let listener = listener.transpose().map_err(|error| error.to_string())?;
        let played = listener.as_ref().and_then(|listener| listener.local_addr().ok());
        let (server, mut address) = match (&theatre.server, played) {
            (_, Some(address)) => (None, address.to_string()),
            (Some(address), None) => (None, address.clone()),
            (None, None) => {
                let server = Server::start(&script.options)?;
                let address = server.address.clone();
                (Some(server), address)
            }
        };
        let proxy = theatre.proxy.as_ref().filter(|_| listener.is_none());
        let proxy = proxy.map(|proxy| proxy.in_front_of(&address)).transpose();
        let proxy = proxy.map_err(|error| error.to_string())?;
        if let Some(proxy) = &proxy {
            address = proxy.address.clone();
        }
        let steps = script.unrolled().into_iter().enumerate();
        let beats: Vec<_> = steps.map(|(at, (round, step))| Beat { step, round, at }).collect();
        let is_console = |step: &&Step| step.form.form.starts_with("console");
        Ok(Stage {
            theatre,
            way,
            address,
            server,
            listener,
            _proxy: proxy,
            clients: Vec::new(),
            fences: 0,
            said: vec![false; beats.len()],
            beats,
            public: Vec::new(),
            told: Vec::new(),
            last_act: Instant::now(),
            is_loose: !script.options.is_empty(),
            is_stopping: false,
            watches_console: script.written().iter().any(is_console),
            stopped: None,
        })
    }

    /// Those whom nothing concerns: one without a name, wherever neither places nor the console
    /// are counted; in the second and third way also one in the room, where the transcript leaves
    /// a place.
    fn place_extras(&mut self, script: &Script) -> Result<(), String> {
        let is_free = script.options.is_empty() && !script.is_slow && !script.plays_server;
        if !is_free || self.watches_console {
            return Ok(());
        }
        self.connect("the bystander", Part::Bystander)?;
        let greeting = Pattern(vec![b"HELLO linechat/1 ".to_vec(), Vec::new()]);
        self.look_for("the bystander", &greeting)?;
        let bytes = script.written().iter().map(|step| step.who.concat().len()).max();
        let has_place = !script.is_large() && bytes.is_some_and(|bytes| bytes < LONGEST_LINE / 2);
        if self.way != Way::AsWritten && has_place {
            self.enter(SPECTATOR, Part::Spectator)?;
            for line in [format!("WELCOME {SPECTATOR} 1"), format!("USERS 1 {SPECTATOR}")] {
                self.look_for(SPECTATOR, &Pattern(vec![line.into_bytes()]))?;
            }
        }
        Ok(())
    }

    fn has_spectator(&self) -> bool {
        self.clients.iter().any(|client| client.part == Part::Spectator)
    }

    /// How many are in the room, for whom the transcript counts so many.
    pub fn size(&self, count: usize) -> usize {
        count + usize::from(self.has_spectator())
    }

    /// What the transcript expects, with the one who is in the room besides.
    pub fn with_spectator(&self, line: Vec<u8>) -> Vec<u8> {
        if !self.has_spectator() {
            return line;
        }
        let Ok(text) = String::from_utf8(line.clone()) else { return line };
        let mut words: Vec<_> = text.split(' ').map(str::to_owned).collect();
        let place = match words[0].as_str() {
            "USERS" => 1,
            "WELCOME" | "JOINED" | "LEFT" => 2,
            _ => return line,
        };
        let Some(Ok(count)) = words.get(place).map(|count| count.parse::<usize>()) else {
            return line;
        };
        words[place] = (count + 1).to_string();
        if place == 1 {
            words.insert(2, SPECTATOR.to_owned());
        }
        words.join(" ").into_bytes()
    }

    fn step(&mut self, file: &str, beat: Beat) -> Result<(), String> {
        self.goes_on()?;
        if matches!(beat.step.form.role, Role::Acts | Role::Sends) {
            self.last_act = Instant::now();
        }
        let result = match beat.step.form.play {
            Play::Once(play) => play(self, beat),
            Play::Each(play) => beat.step.who.iter().try_for_each(|name| play(self, name, beat)),
            Play::Block => Ok(()),
        };
        result.map_err(|what| {
            let Step { line, source, who, .. } = beat.step;
            format!("        {file}:{line}: {source}\n{}{}", indent(&what), self.history(who))
        })
    }

    pub fn connect(&mut self, name: &str, part: Part) -> Result<(), String> {
        let (host, port) = self.address.rsplit_once(':').ok_or("the server is HOST:PORT")?;
        let via = if part == Part::Cast { self.theatre.via } else { Via::Sockets };
        let line = match via {
            Via::Sockets => clients::socket(&self.address)?,
            Via::Nc => clients::nc(host, port)?,
            Via::Telnet => clients::telnet(host, port)?,
        };
        let ending = if via == Via::Telnet { "\n" } else { "\r\n" };
        self.clients.push(Client::new(name, part, line, ending));
        match via {
            Via::Telnet => self.skip_telnet_greeting(name),
            _ => Ok(()),
        }
    }

    /// Takes away what telnet says for itself before the server's first line.
    fn skip_telnet_greeting(&mut self, name: &str) -> Result<(), String> {
        let last = b"Escape character is 'off'.\n";
        let patience = &self.theatre.patience;
        let (since, limit) = (Instant::now(), patience.with_programs("telnet"));
        loop {
            self.goes_on()?;
            let client = self.find(name)?;
            let received = &client.received;
            if let Some(at) = received.windows(last.len()).position(|window| window == last) {
                client.received.take(at + last.len());
                return Ok(());
            }
            if client.is_closed || since.elapsed() > limit {
                patience.is_spent_on("telnet");
                return Err(format!("telnet does not connect: {}", client.unread()));
            }
            client.read(SLICE);
        }
    }

    /// A step's text with everything filled in.
    pub fn pattern(&self, beat: Beat) -> Pattern {
        self.fill_in(&beat.step.text, beat.round)
    }

    /// The same where nothing is left open.
    pub fn bytes(&self, beat: Beat) -> Vec<u8> {
        self.pattern(beat).0.concat()
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

    /// Where somebody's connection comes from, as the server sees it; unknown behind a proxy or
    /// another program.
    fn address_of(&self, name: &str) -> Option<Vec<u8>> {
        let client = self.clients.iter().find(|client| client.name == name)?;
        let address = client.address().filter(|_| self.theatre.proxy.is_none())?;
        Some(address.to_string().into_bytes())
    }

    pub fn find(&mut self, name: &str) -> Result<&mut Client, String> {
        let client = self.clients.iter_mut().find(|client| client.name == name);
        client.ok_or(format!("{name} is not connected"))
    }

    pub fn forget(&mut self, name: &str) {
        self.clients.retain(|client| client.name != name);
    }

    pub fn has_been_said(&self, beat: Beat) -> bool {
        self.said[beat.at]
    }

    /// Sends what a step says, cut as the way of playing wants it.
    pub fn say(&mut self, name: &str, beat: Beat) -> Result<(), String> {
        let is_wire = self.find(name)?.part == Part::Cast;
        match self.way {
            // Once is enough of what is said again and again.
            Way::ByteByByte if is_wire && beat.round <= 1 => {
                for piece in cut(&self.bytes(beat)) {
                    self.find(name)?.send(&piece);
                    self.tick()?;
                }
            }
            Way::InOnePiece if is_wire => {
                let piece = self.gather(name, beat.at);
                self.find(name)?.send(&piece);
            }
            _ => {
                let bytes = self.bytes(beat);
                self.find(name)?.send(&bytes);
            }
        }
        Ok(())
    }

    /// What somebody says from here on until somebody does something else.
    fn gather(&mut self, name: &str, at: usize) -> Vec<u8> {
        let mut piece = Vec::new();
        for index in at..self.beats.len() {
            let beat = self.beats[index];
            match beat.step.form.role {
                Role::Sends if beat.step.who == [name] && piece.len() < PIECE => {
                    piece.extend(self.bytes(beat));
                    self.said[index] = true;
                }
                Role::Asserts => {}
                _ => break,
            }
        }
        piece
    }

    /// Takes the next line and compares it.
    pub fn look_for(&mut self, name: &str, expected: &Pattern) -> Result<(), String> {
        let line = loop {
            let client = self.find(name)?;
            if let Some(line) = client.take_line() {
                break line;
            }
            if client.is_closed {
                let received = format!("[closed] {}", client.unread());
                return Err(side_by_side(&expected.show(), &received));
            }
            if let Err(what) = self.read_more(name) {
                return Err(side_by_side(&expected.show(), &what));
            }
        };
        let client = self.find(name)?;
        let text = client.without_ending(&line).to_vec();
        client.history.push(text.clone());
        if text.starts_with(b"LEFT ") {
            client.awaited_leaves = client.awaited_leaves.saturating_sub(1);
        }
        if !expected.matches(&text) {
            return Err(side_by_side(&expected.show(), &show(&text)));
        }
        if client.part == Part::Cast {
            grammar::check(&text)?;
            if grammar::is_news(&text) {
                self.public.push(text);
            }
        }
        Ok(())
    }

    pub fn nothing_unread(&mut self, name: &str) -> Result<(), String> {
        let client = self.find(name)?;
        match client.received.is_empty() {
            true => Ok(()),
            false => Err(format!("{name} received too much: {}", client.unread())),
        }
    }

    /// Nobody may have received more than what the transcript says.
    fn end(&mut self) -> Result<(), String> {
        self.fence_all()?;
        self.fence_all()?;
        let names: Vec<_> = self.clients.iter().map(|client| client.name.clone()).collect();
        names.iter().try_for_each(|name| self.end_of(name))?;
        self.end_of_server()
    }

    fn end_of(&mut self, name: &str) -> Result<(), String> {
        let client = self.find(name)?;
        match client.part {
            _ if client.is_stalled => return Ok(()),
            Part::Bystander | Part::Spectator => return self.end_of_extra(name),
            Part::Cast | Part::Ours => self.nothing_unread(name)?,
        }
        let client = self.find(name)?;
        if client.is_closed && !(client.was_to_close || client.has_half_closed) {
            return Err(format!("the server has closed {name}'s connection"));
        }
        if client.part == Part::Ours {
            return Err(format!("the transcript does not say how {name} exits"));
        }
        while self.find(name)?.has_half_closed && !self.find(name)?.is_closed {
            self.read_more(name)?;
        }
        self.nothing_unread(name)
    }

    /// One without a name receives nothing; one in the room, what is public, and all of it.
    fn end_of_extra(&mut self, name: &str) -> Result<(), String> {
        let is_stopping = self.is_stopping;
        let client = self.find(name)?;
        let is_spectator = client.part == Part::Spectator;
        let mut seen = Vec::new();
        while let Some(line) = client.take_line() {
            let text = client.without_ending(&line).to_vec();
            let is_due = (is_spectator && grammar::is_public(&text))
                || (is_stopping && text.starts_with(b"BYE"));
            if !is_due || grammar::check(&text).is_err() {
                return Err(format!("{name}, whom nothing concerns, received: {}", show(&text)));
            }
            seen.push(text);
        }
        if client.is_closed && !is_stopping {
            return Err(format!("the server has closed the connection of {name}"));
        }
        let missing = self.public.iter().find(|line| !seen.contains(line));
        match missing.filter(|_| is_spectator && !is_stopping) {
            Some(line) => Err(format!("{name}, who only watches, did not receive: {}", show(line))),
            None => Ok(()),
        }
    }

    fn end_of_server(&mut self) -> Result<(), String> {
        let limit = self.theatre.patience.with_programs("the end of the server");
        let Some(server) = &mut self.server else { return Ok(()) };
        if server.child.try_wait().is_ok_and(|ended| ended.is_none()) {
            let _ = server.child.kill();
            self.no_more_on_the_console(limit)?;
        } else if !server.child.wait().is_ok_and(|ended| ended.success()) {
            return Err(format!("the server has ended: {}", server.complaints()));
        }
        match self.server.as_mut().map(Server::complaints).unwrap_or_default() {
            complaints if complaints.is_empty() => Ok(()),
            complaints => Err(format!("the server complains: {complaints}")),
        }
    }

    pub fn no_more_on_the_console(&mut self, limit: Duration) -> Result<(), String> {
        let Some(server) = &mut self.server else { return Ok(()) };
        match self.watches_console {
            false => Ok(()),
            true => match server.next_line_within(limit)? {
                None => Ok(()),
                Some(line) => {
                    Err(format!("a line of the console that is not in the transcript: {line}"))
                }
            },
        }
    }

    /// What these had received when something went wrong.
    fn history(&self, names: &[String]) -> String {
        let mut text = String::new();
        let is_shown = |client: &&Client| is_cast(client) && names.contains(&client.name);
        for client in self.clients.iter().filter(is_shown).take(CAST_SHOWN) {
            let skipped = client.history.len().saturating_sub(LINES_SHOWN);
            text += &format!("\n          {} has received so far:", client.name);
            for line in &client.history[skipped..] {
                text += &format!("\n            {}", show(line));
            }
            if !client.received.is_empty() {
                text += &format!("\n            not yet looked at: {}", client.unread());
            }
        }
        text
    }
}

/// Every byte on its own, save those in the middle of what is long.
fn cut(bytes: &[u8]) -> Vec<Vec<u8>> {
    let (start, rest) = bytes.split_at(CUT.min(bytes.len()));
    let (middle, end) = rest.split_at(rest.len().saturating_sub(CUT));
    let middle = if middle.is_empty() { Vec::new() } else { vec![middle.to_vec()] };
    let single = |bytes: &[u8]| bytes.iter().map(|&it| vec![it]).collect::<Vec<_>>();
    [single(start), middle, single(end)].concat()
}

/// How many people, and lines of each, are shown when something went wrong.
const CAST_SHOWN: usize = 3;
const LINES_SHOWN: usize = 6;

/// The name of who is in the room in the second and third way.
const SPECTATOR: &str = "Watcher";

fn indent(text: &str) -> String {
    text.lines().map(|line| format!("          {line}")).collect::<Vec<_>>().join("\n")
}
