//! Carries out the steps of a transcript, one after the other.

use crate::client::{linechat_client, Client, Terminal, SLICE};
use crate::forms::{Action, Step};
use crate::process::{self, signal};
use crate::rules::{roster, MAX_PUSHED_ROSTER};
use crate::screen::Screen;
use crate::script::Script;
use crate::session::Session;
use crate::target::{Outcome, Target};
use crate::text::{show, side_by_side, Pattern};
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::process::ExitStatus;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

/// More than the buffers of kernels and the server hold for a client that does not read, in bytes.
const FLOOD: usize = 32 * 1024 * 1024;
/// If senders can send only `LITTLE` bytes in this time, the server makes them wait.
const MADE_TO_WAIT: Duration = Duration::from_secs(1);
const LITTLE: usize = 256 * 1024;
/// The next step then comes, though a slow server has not made them wait yet.
const FLOODED: Duration = Duration::from_secs(5);
const READS_A_SECOND: u32 = 16;
/// What a time-out may be late by, apart from a tenth of it.
const GRACE: Duration = Duration::from_secs(2);
/// Private messages that are sent before it is seen how long their confirmations take: with the
/// budget 1.2 seconds, without it much less, even if the server is slow.
const TOLD_AT_ONCE: usize = 20;
const BEHIND: Duration = Duration::from_secs(1);
/// More of them than the buffers of kernels and a right server hold.
const MOST_TOLD: usize = 8000;

pub fn play(target: &Target, script: &Script) -> Outcome {
    if let Some(why) = target.misses(script) {
        return Outcome::Skipped(why);
    }
    let mut session = match Session::begin(target, script) {
        Ok(session) => session,
        Err(error) => return Outcome::Failed(format!("          {error}")),
    };
    match (session.play_all(script), target.is_exhausted()) {
        (Ok(()), _) => Outcome::Passed,
        // It may have failed because the run is over.
        (Err(_), Some(why)) => Outcome::Skipped(why),
        (Err(error), None) => Outcome::Failed(error),
    }
}

impl Session<'_> {
    fn play_all(&mut self, script: &Script) -> Result<(), String> {
        let failure = |session: &Session, place: String, what: String| {
            let what: String = what.lines().map(|line| format!("\n          {line}")).collect();
            format!("        {place}{what}{}", session.situation())
        };
        for step in &script.steps {
            self.goes_on()?;
            self.play(step).map_err(|what| {
                let place = format!("{}:{}: {}", script.file(), step.line, step.source);
                failure(self, place, what)
            })?;
        }
        self.end().map_err(|what| failure(self, format!("at the end of {}", script.name), what))
    }

    fn play(&mut self, step: &Step) -> Result<(), String> {
        match step.action {
            Action::BeInTheRoom => self.be_in_the_room(step),
            Action::Console => self.console(step),
            Action::SignalServer => self.signal_server(&step.word),
            Action::ServerExits => self.server_exits(step),
            Action::Flood => self.flood(step),
            Action::PassTime => self.pass_time(seconds(step)),
            _ => step.who.iter().try_for_each(|name| self.act(name, step)),
        }
    }

    fn act(&mut self, name: &str, step: &Step) -> Result<(), String> {
        match step.action {
            Action::Connect => {
                self.fence_all_but(name)?;
                self.connect(name)
            }
            Action::Send => self.send(name, &self.bytes(step)?),
            Action::Receive => self.look_for(name, &self.pattern(step)?),
            Action::ReceiveSome => self.receive_some(name, &self.pattern(step)?),
            Action::ReceiveBytes => self.receive_bytes(name, &self.bytes(step)?),
            Action::ReceiveAfter => self.receive_after(name, step),
            Action::ReceiveAllTold => {
                std::mem::take(&mut self.told).iter().try_for_each(|line| self.expect(name, line))
            }
            Action::IsClosed => self.is_closed(name),
            Action::Close => {
                self.prepare_to_leave(name)?;
                self.forget(name);
                Ok(())
            }
            Action::HalfClose => {
                self.fence_all_but(name)?;
                self.is_loose = true;
                self.find(name)?.end_input();
                Ok(())
            }
            Action::Reset => self.reset(name, &self.bytes(step)?),
            Action::StopReading => self.stop_reading(name),
            Action::FallBehind => self.fall_behind(name, &step.word),
            Action::ReadSlowly => self.read_slowly(name, step.number * 1024),
            Action::IsCutOff => self.is_cut_off(name, seconds(step)),
            Action::Run => self.run(name, step),
            Action::Show => self.show(name, &self.pattern(step)?),
            Action::Complain => self.complain(name, &self.pattern(step)?),
            Action::ReceiveSignal => {
                let process = self.find(name)?.terminal()?.process.ok_or("there is no process")?;
                signal(process, &step.word)
            }
            Action::Exit => self.exit(name, step.number),
            other => Err(format!("{other:?} is not done by each client")),
        }
    }
}

fn seconds(step: &Step) -> Duration {
    Duration::from_secs(step.number as u64)
}

/// Coming, sending, receiving, going.
impl Session<'_> {
    /// The clients join in order, and each receives what PROTOCOL.md says.
    fn be_in_the_room(&mut self, step: &Step) -> Result<(), String> {
        for (count, name) in (1..).zip(&step.who) {
            let (here, others) = (&step.who[..count], &step.who[..count - 1]);
            self.fence_all_but(name)?;
            self.connect(name)?;
            self.look_for_greeting(name)?;
            self.send(name, format!("NAME {name}\n").as_bytes())?;
            self.expect(name, &format!("WELCOME {name} {count}"))?;
            for other in others {
                self.expect(other, &format!("JOINED {name} {count}"))?;
            }
            for line in roster(here).iter().filter(|_| count <= MAX_PUSHED_ROSTER) {
                here.iter().try_for_each(|name| self.expect(name, line))?;
            }
        }
        Ok(())
    }

    /// One line like this, and all further ones that follow it.
    fn receive_some(&mut self, name: &str, pattern: &Pattern) -> Result<(), String> {
        self.look_for(name, pattern)?;
        self.fence(name)?;
        loop {
            let client = self.find(name)?;
            let line = client.received().split_inclusive(|&byte| byte == b'\n').next();
            match line.is_some_and(|line| pattern.matches(client.without_ending(line))) {
                true => self.look_for(name, pattern)?,
                false => return Ok(()),
            }
        }
    }

    fn receive_bytes(&mut self, name: &str, expected: &[u8]) -> Result<(), String> {
        while self.find(name)?.received().len() < expected.len() {
            self.read_more(name).map_err(|what| side_by_side(&show(expected), &what))?;
        }
        let client = self.find(name)?;
        match client.received().starts_with(expected) {
            true => drop(client.take(expected.len())),
            false => return Err(side_by_side(&show(expected), &client.unread())),
        }
        Ok(())
    }

    fn is_closed(&mut self, name: &str) -> Result<(), String> {
        self.fence_all_but(name)?;
        self.await_end(name)?;
        self.nothing_unread(name)?;
        // A server that stops need not read on, so the system may reset.
        match self.find(name)?.is_reset && !self.is_stopping {
            true => Err(format!("{name}'s connection was reset, so the last lines can get lost")),
            false => Ok(()),
        }
    }

    fn prepare_to_leave(&mut self, name: &str) -> Result<(), String> {
        self.fence_all_but(name)?;
        self.fence(name)?;
        self.nothing_unread(name)?;
        self.is_loose = true;
        Ok(())
    }

    fn stop_reading(&mut self, name: &str) -> Result<(), String> {
        self.prepare_to_leave(name)?;
        self.find(name)?.is_exempt = true;
        Ok(())
    }

    /// Linux resets a connection that is closed before all of its input has been read.
    fn reset(&mut self, name: &str, last_words: &[u8]) -> Result<(), String> {
        self.prepare_to_leave(name)?;
        let limit = self.target.timeouts.server();
        let socket = &mut self.find(name)?.socket;
        let answered = socket
            .set_read_timeout(Some(limit))
            .and_then(|()| socket.write_all(b"PING\n"))
            .and_then(|()| socket.peek(&mut [0]))
            .and_then(|_| socket.write_all(last_words));
        answered.map_err(|error| format!("no PONG before the reset: {error}"))?;
        self.forget(name);
        Ok(())
    }
}

/// The server's process.
impl Session<'_> {
    fn console(&mut self, step: &Step) -> Result<(), String> {
        let (expected, limit) = (self.pattern(step)?, self.target.timeouts.program());
        let server = self.server.as_mut().ok_or("there is no console")?;
        let line = server.next_line_within(limit)?.unwrap_or("nothing more".to_owned());
        expected.compare(line.as_bytes())
    }

    fn signal_server(&mut self, name: &str) -> Result<(), String> {
        self.fence_all()?;
        (self.is_loose, self.is_stopping) = (true, true);
        let server = self.server.as_ref().ok_or("there is no server to signal")?;
        signal(server.child.id(), name)?;
        if name == "SIGKILL" {
            self.server = None;
        }
        Ok(())
    }

    fn server_exits(&mut self, step: &Step) -> Result<(), String> {
        let limit = self.target.timeouts.program();
        let server = self.server.as_mut().ok_or("there is no server")?;
        let ended = server.wait_within(limit).ok_or("the server does not end")?;
        check_exit(step.number, ended, &server.complaints())
    }
}

fn check_exit(expected: usize, ended: ExitStatus, complaints: &str) -> Result<(), String> {
    match ended.code() == Some(expected as i32) && complaints.is_empty() {
        true => Ok(()),
        false => Err(side_by_side(
            &format!("exit status {expected}"),
            &format!("{ended} and '{complaints}' on standard error"),
        )),
    }
}

/// Time-outs, floods, and clients that read slowly or not at all.
impl Session<'_> {
    fn pass_time(&mut self, time: Duration) -> Result<(), String> {
        let since = Instant::now();
        while since.elapsed() < time {
            self.goes_on()?;
            thread::sleep(SLICE);
        }
        Ok(())
    }

    fn receive_after(&mut self, name: &str, step: &Step) -> Result<(), String> {
        self.comes_after(name, seconds(step), |client| {
            client.read(SLICE);
            client.is_closed || client.received().contains(&b'\n')
        })?;
        self.look_for(name, &self.pattern(step)?)
    }

    /// A connection that the server has dropped answers what is sent with a reset.
    fn is_cut_off(&mut self, name: &str, due: Duration) -> Result<(), String> {
        self.comes_after(name, due, |client| {
            thread::sleep(SLICE);
            client.socket.write_all(b"\n").is_err()
        })
    }

    /// Waits until something has come, and checks that it came this long after `last_act`.
    fn comes_after(
        &mut self,
        name: &str,
        due: Duration,
        has_come: impl Fn(&mut Client) -> bool,
    ) -> Result<(), String> {
        let (since, latest) = (self.last_act, due.mul_f64(1.1) + GRACE);
        while !has_come(self.find(name)?) {
            self.goes_on()?;
            if since.elapsed() > latest {
                return Err(format!("nothing after {:.1} s", since.elapsed().as_secs_f64()));
            }
        }
        let took = since.elapsed();
        match took < due.mul_f64(0.9) || took > latest {
            true => Err(format!("not in time, but after {:.1} s", took.as_secs_f64())),
            false => Ok(()),
        }
    }

    /// The clients send this again and again from now on, and do nothing else. Returns when the server
    /// makes them wait, or has taken enough.
    fn flood(&mut self, step: &Step) -> Result<(), String> {
        let (line, who) = (self.bytes(step)?, &step.who);
        let sent = Arc::new(AtomicUsize::new(0));
        for name in who {
            self.fence_all_but(name)?;
            let socket = self.give_away(name)?;
            let (line, counted, input) = (line.clone(), sent.clone(), socket.clone());
            // Both end with the connection.
            thread::spawn(move || io::copy(&mut &*input, &mut io::sink()));
            thread::spawn(move || {
                while (&*socket).write_all(&line).is_ok() {
                    counted.fetch_add(line.len(), Ordering::Relaxed);
                }
            });
        }
        let (mut seen, begun) = (0, Instant::now());
        while seen < FLOOD * who.len() && begun.elapsed() < FLOODED {
            self.pass_time(MADE_TO_WAIT)?;
            // A server that was only busy takes more before it has served others.
            self.serve_others(&who[0])?;
            let before = std::mem::replace(&mut seen, sent.load(Ordering::Relaxed));
            if seen - before < LITTLE {
                break;
            }
        }
        self.last_act = Instant::now();
        Ok(())
    }

    /// The client reads nothing, while another one sends it private messages until the budget makes
    /// that one wait, which shows that more than the soft limit is pending. How much the kernels hold
    /// besides differs between systems.
    fn fall_behind(&mut self, name: &str, teller: &str) -> Result<(), String> {
        self.stop_reading(name)?;
        let text = "x".repeat(3900);
        let mut took = Duration::ZERO;
        while took < BEHIND {
            if self.told.len() > MOST_TOLD {
                return Err(format!(
                    "{teller} can send {name} {MOST_TOLD} private messages and never waits"
                ));
            }
            let since = Instant::now();
            let numbers = self.told.len()..self.told.len() + TOLD_AT_ONCE;
            for number in numbers.clone() {
                self.transmit(teller, format!("PRIV @{name} {number} {text}\n").as_bytes())?;
                self.told.push(format!("PRIV {teller} {number} {text}"));
            }
            for number in numbers {
                self.expect(teller, &format!("SENT {name} {number} {text}"))?;
            }
            took = since.elapsed();
        }
        Ok(())
    }

    /// The client reads this many bytes a second from now on.
    fn read_slowly(&mut self, name: &str, bytes: usize) -> Result<(), String> {
        self.prepare_to_leave(name)?;
        let socket = self.give_away(name)?;
        let mut buffer = vec![0; bytes / READS_A_SECOND as usize];
        thread::spawn(move || {
            let start = Instant::now();
            for number in 1.. {
                if (&*socket).read_exact(&mut buffer).is_err() {
                    break;
                }
                // A read that comes late makes the next ones no later.
                let next = Duration::from_secs(1) * number / READS_A_SECOND;
                thread::sleep(next.saturating_sub(start.elapsed()));
            }
        });
        Ok(())
    }

    /// A connection on which threads send and receive until it ends.
    fn give_away(&mut self, name: &str) -> Result<Arc<TcpStream>, String> {
        let client = self.find(name)?;
        client.is_exempt = true;
        let socket = client.socket.try_clone().map_err(|error| error.to_string())?;
        let _ = socket.set_read_timeout(None).and_then(|()| socket.set_write_timeout(None));
        Ok(Arc::new(socket))
    }
}

/// linechat-client, through pipes or at a terminal.
impl Session<'_> {
    fn run(&mut self, name: &str, step: &Step) -> Result<(), String> {
        self.fence_all_but(name)?;
        let arguments = String::from_utf8_lossy(&self.bytes(step)?).into_owned();
        let columns = Some(step.number).filter(|&columns| columns > 0);
        let transport = linechat_client(&arguments, columns)
            .map_err(|error| format!("cannot start linechat-client: {error}"))?;
        self.is_loose = true;
        self.clients.push(Client::new(name, transport, true));
        if let Some(columns) = columns {
            self.await_terminal(name, columns)?;
        }
        if let Some(listener) = &self.listener {
            let (socket, _) = listener.accept().map_err(|error| error.to_string())?;
            self.clients.push(Client::new("server", (socket, Vec::new()), true));
        }
        Ok(())
    }

    /// Waits until linechat-client is about to start at its terminal, even when the run is over: before
    /// that the process to end is unknown.
    fn await_terminal(&mut self, name: &str, columns: usize) -> Result<(), String> {
        let client = self.find(name)?;
        client.terminal = Some(Terminal { screen: Screen::new(columns), process: None });
        let line = loop {
            match client.take_line() {
                Some(line) => break line,
                None if client.read(process::STUCK) => {}
                None => return Err(format!("there is no terminal: {}", client.unread())),
            }
        };
        client.terminal()?.process = String::from_utf8_lossy(&line).trim().parse().ok();
        Ok(())
    }

    fn show(&mut self, name: &str, expected: &Pattern) -> Result<(), String> {
        self.fence_all_but(name)?;
        let (since, limit) = (Instant::now(), self.target.timeouts.program());
        loop {
            self.goes_on()?;
            let client = self.find(name)?;
            let shown = expected.compare(client.terminal()?.screen.line_at_cursor().as_bytes());
            if shown.is_ok() || client.is_closed || since.elapsed() > limit {
                return shown;
            }
            client.read(SLICE);
        }
    }

    fn complain(&mut self, name: &str, expected: &Pattern) -> Result<(), String> {
        let limit = self.target.timeouts.program();
        let line = self.find(name)?.complaints.line(limit);
        let line = line.map_err(|_| "nothing on standard error")?.unwrap_or_default();
        expected.compare(line.as_bytes())
    }

    fn exit(&mut self, name: &str, status: usize) -> Result<(), String> {
        self.read_to_end(name)?;
        self.nothing_unread(name)?;
        let limit = self.target.timeouts.program();
        let client = self.find(name)?;
        let complaints = client.complaints.rest(limit);
        let complaints = complaints.map_err(|_| "it does not end its standard error")?;
        let program = client.programs.first_mut().ok_or("there is no program")?;
        let ended = program.wait().map_err(|error| error.to_string())?;
        check_exit(status, ended, &complaints)?;
        self.forget(name);
        Ok(())
    }
}
