//! Absence is proved by order, never by waiting. A fence is a PING whose PONG is awaited: when it
//! comes, the server has dealt with all that this client had sent before, and has sent before it
//! all that it owed to this client. So before somebody else acts, those who have sent something
//! pass a fence, and at the end everybody passes two: after the first round all requests are dealt
//! with, and in the second whatever they caused must arrive before the PONG.

use crate::clients::{Client, Part, Via, SLICE};
use crate::patience::PONG;
use crate::stage::Stage;
use crate::text::{show, side_by_side};
use std::time::{Duration, Instant};

/// Bytes before a PONG.
const MUCH_ELSE: usize = 4096;
/// Times that somebody else is served before it is said of a server that it leaves something out.
const OTHERS_SERVED: usize = 3;

impl Client {
    fn is_greeted(&self) -> bool {
        !self.received.is_empty() || !self.history.is_empty()
    }

    /// One who has not been greeted asks for nothing: the greeting must not wait for that.
    pub fn can_pass_fence(&self) -> bool {
        let is_silent = self.is_closed || self.has_half_closed || self.is_stalled;
        !(is_silent || !self.is_greeted() || self.is_mid_line || self.part == Part::Ours)
    }

    /// Takes the PONG out of what has been received, once it is there, from `searched` on. Returns
    /// where it stood.
    fn take_pong(&mut self, pong: &[u8], searched: &mut usize) -> Result<Option<usize>, String> {
        // Only whole lines are looked at; a telnet command may stand before one.
        let end = self.received.iter().rposition(|&byte| byte == b'\n').map_or(0, |at| at + 1);
        let from = *searched.min(&mut end.clone());
        let found = self.received[from..end].windows(pong.len()).position(|it| it == pong);
        *searched = end;
        let Some(found) = found.map(|found| found + from) else { return Ok(None) };
        let behind = &self.received[found + pong.len()..];
        let line_end = behind.iter().position(|&byte| byte == b'\n').unwrap_or(0);
        let line = self.received.cut(found, found + pong.len() + line_end + 1);
        (self.is_unfenced, self.lines_unfenced) = (false, 0);
        match self.without_ending(&line) == pong {
            true => Ok(Some(found)),
            false => Err(side_by_side(&show(pong), &show(&line))),
        }
    }
}

impl Stage<'_> {
    /// Passes a fence for everybody who has sent something, save one.
    pub fn fence_all_but(&mut self, name: &str) -> Result<(), String> {
        for at in 0..self.clients.len() {
            if self.clients[at].is_unfenced && self.clients[at].name != name {
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
        let patience = &self.theatre.patience;
        let client = &mut self.clients[at];
        if !client.can_pass_fence() {
            return Ok(false);
        }
        let before = client.received.len();
        self.fences += 1;
        let pong = format!("PONG fence-{}", self.fences).into_bytes();
        let ahead = client.lines_unfenced;
        client.send(format!("PING fence-{}\n", self.fences).as_bytes());
        let (sent, mut searched, mut progress) = (Instant::now(), 0, Instant::now());
        loop {
            self.goes_on()?;
            let client = &mut self.clients[at];
            if let Some(found) = client.take_pong(&pong, &mut searched)? {
                // Behind much else, a PONG tells nothing of how busy everything is.
                if found < MUCH_ELSE {
                    patience.saw_pong_after(sent.elapsed());
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
            if progress.elapsed() > patience.with_pong_behind(ahead) {
                patience.is_spent_on(PONG);
                return Err(format!("{} gets no PONG; unread: {}", client.name, client.unread()));
            }
        }
    }

    /// Waits for something more to arrive. An error says that nothing will.
    pub fn read_more(&mut self, name: &str) -> Result<(), String> {
        // nc does not show that a fence met a closed connection, so it gets more time before one.
        let is_nc = self.theatre.via == Via::Nc;
        let first = if is_nc { SLICE * 50 } else { SLICE };
        let before = self.find(name)?.received.len();
        if self.find(name)?.read(first) {
            return Ok(());
        }
        self.fence_all_but(name)?;
        if self.fence(name)? {
            return Ok(());
        }
        // What somebody has sent who can pass no fence may still be on its way.
        let is_loose = self.is_loose
            || self.clients.iter().any(|client| client.is_unfenced && !client.can_pass_fence());
        let client = self.find(name)?;
        let cause = match &*client {
            Client { part: Part::Ours, .. } => "what a program shows",
            Client { has_half_closed: true, .. } => "the end of a connection",
            Client { awaited_leaves: 1.., .. } => "LEFT",
            // As with a PONG, it may be about to be learned how slow everything is.
            _ if !client.is_greeted() => PONG,
            _ => "a line",
        };
        let may_wait = is_loose || client.awaited_leaves > 0 || !client.can_pass_fence();
        // It may have come right behind the PONG.
        let has_come = may_wait && client.received.len() > before;
        match has_come || may_wait && self.await_more(name, cause)? {
            true => Ok(()),
            false => Err(format!("nothing more in time; unread: '{}'", self.find(name)?.unread())),
        }
    }

    /// Waits for something that no fence tells of, until patience is at its end.
    fn await_more(&mut self, name: &str, cause: &'static str) -> Result<bool, String> {
        let patience = &self.theatre.patience;
        let has_program = self.clients.iter().any(|client| client.part == Part::Ours);
        let limit = || match cause {
            _ if has_program => patience.with_programs(cause),
            PONG => patience.with_pong_behind(0),
            _ => patience.with(cause),
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
                patience.is_spent_on(cause);
                return Ok(self.find(name)?.read(Duration::from_millis(1)));
            }
        }
    }

    /// Somebody else passes several fences. Returns whether there is anybody.
    pub fn serve_others(&mut self, name: &str) -> Result<bool, String> {
        let other = |client: &Client| client.name != name && client.can_pass_fence();
        let Some(other) = self.clients.iter().position(other) else { return Ok(false) };
        (0..OTHERS_SERVED).try_for_each(|_| self.fence_at(other).map(drop))?;
        Ok(true)
    }

    /// Waits until the server has ended the connection.
    pub fn await_end(&mut self, name: &str) -> Result<(), String> {
        let is_nc = self.theatre.via == Via::Nc;
        let client = self.find(name)?;
        if is_nc && client.program().is_ok() {
            // nc waits for the end of what is typed too. Were the connection still open, the
            // answer to this would be received before that ends it.
            client.send(b"PING\n");
            client.end_input();
        }
        client.read(SLICE);
        if !self.find(name)?.is_closed && self.closes_late(name)? {
            return Err(format!("{name}'s connection stays open, though others go on"));
        }
        while !self.find(name)?.is_closed {
            let is_more = self.find(name)?.read(SLICE);
            if !is_more && !self.await_more(name, "the end of a connection")? {
                return Err(format!("{name}'s connection is still open"));
            }
        }
        Ok(())
    }

    /// Our own server, played to directly, has ended a connection that it is to end by the time
    /// that somebody else has passed several fences. Returns whether it should have but has not.
    fn closes_late(&mut self, name: &str) -> Result<bool, String> {
        if !self.theatre.is_plain() || self.theatre.proxy.is_some() || self.is_loose {
            return Ok(false);
        }
        if !self.serve_others(name)? {
            return Ok(false);
        }
        let client = self.find(name)?;
        while !client.is_closed && client.read(SLICE) {}
        Ok(!client.is_closed)
    }

    /// Somebody will be noticed to be gone, at a time that no fence tells.
    pub fn await_leave(&mut self) {
        self.clients.iter_mut().for_each(|client| client.awaited_leaves += 1);
    }

    /// Lets the server read what has been sent so far, by asking as somebody else.
    pub fn tick(&mut self) -> Result<(), String> {
        match self.clients.iter().position(|client| client.part == Part::Bystander) {
            Some(at) => self.fence_at(at).map(drop),
            None => Ok(()),
        }
    }
}
