//! What is tested: whose server, by which kind of client, and what of it cannot be played there.

use crate::broken::Proxy;
use crate::client::Via;
use crate::forms::{Needs, Step};
use crate::script::{Level, Script};
use crate::timeouts::Timeouts;
use std::sync::Arc;

/// Why a transcript is not played any more.
pub const UNPLAYED: &str = "not played any more, so long after the first failure";
pub const TOO_LATE: &str = "not played within half a minute: SLOW=1 plays it";
/// Why one is not played at all.
pub const SLOW: &str = "takes long: SLOW=1 plays it";

#[derive(Default)]
pub struct Target {
    /// A server that is running already, as HOST:PORT. `None`: this repository's own, a fresh one
    /// for each transcript.
    pub server: Option<String>,
    pub via: Via,
    pub proxy: Option<Arc<Proxy>>,
    /// The levels that are asked for; empty: all.
    pub levels: Vec<Level>,
    /// Transcripts that take long are played too.
    pub slow: bool,
    pub timeouts: Timeouts,
}

pub enum Outcome {
    Passed,
    Failed(String),
    Skipped(&'static str),
}

impl Target {
    /// The server is our own, and the clients are sockets of the suite.
    pub fn is_plain(&self) -> bool {
        self.server.is_none() && self.via == Via::Sockets
    }

    /// This level is asked for. What only our own programs do is not asked of another server.
    pub fn has_level(&self, level: Level) -> bool {
        match self.levels.as_slice() {
            [] => level != Level::Linechat || self.server.is_none(),
            levels => levels.contains(&level),
        }
    }

    /// Why nothing more is to be played; `None` if the run goes on. With SLOW=1 everything is
    /// played, however long it takes.
    pub fn is_exhausted(&self) -> Option<&'static str> {
        let is_hurried = self.server.is_some() && self.via == Via::Sockets;
        match self.slow {
            _ if self.timeouts.is_over() => Some(UNPLAYED),
            false if self.timeouts.is_exhausted() => Some(UNPLAYED),
            false if is_hurried && self.timeouts.is_late() => Some(TOO_LATE),
            _ => None,
        }
    }

    /// Why a script cannot be played here; `None` if it can.
    pub fn misses(&self, script: &Script) -> Option<&'static str> {
        if script.is_slow && !self.slow {
            return Some(SLOW);
        }
        if self.server.is_some() && !script.options.is_empty() {
            return Some("starts the server with options");
        }
        // An nc whose output is not read does not look at its input either.
        let is_stuck = script.needs(Needs::OwnPace) && script.needs(Needs::HalfClose);
        if self.via == Via::Nc && is_stuck {
            return Some("does what nc cannot");
        }
        script.written().iter().find_map(|step| self.lacks(step))
    }

    /// What the step needs and is not to be had here.
    fn lacks(&self, step: &Step) -> Option<&'static str> {
        let is_telnet = self.via == Via::Telnet;
        let (is_lacking, why) = match step.needs {
            Needs::Nothing => (false, ""),
            Needs::Process | Needs::Signal if self.server.is_some() => {
                (true, "watches or ends the server's process")
            }
            Needs::Process => (false, ""),
            Needs::Signal => (cfg!(windows), "sends a signal"),
            Needs::OurClient | Needs::Terminal if !self.is_plain() => {
                (true, "is about linechat-client")
            }
            Needs::OurClient => (false, ""),
            Needs::Terminal => (!cfg!(target_os = "linux"), "needs the script(1) of Linux"),
            Needs::OwnPace if self.proxy.is_some() => {
                (true, "needs a server that nothing buffers for")
            }
            // A telnet whose output is not read cannot be ended with its terminal.
            Needs::OwnPace | Needs::HalfClose | Needs::PlainOutput => {
                (is_telnet, "does what telnet cannot")
            }
            Needs::Socket => (self.via != Via::Sockets, "does what this program cannot"),
            Needs::PlainInput if step.is_long() => {
                (self.via != Via::Sockets, "says more at once than this program takes")
            }
            // telnet ends lines its own way, doubles the byte 255, and takes Ctrl-E, with the eighth
            // bit or without, as a command.
            Needs::PlainInput => {
                let is_special = |byte| matches!(byte, b'\r' | 0xff | 0x05 | 0x85);
                let names = step.who.iter().flat_map(|name| name.bytes());
                let is_lacking = step.text.bytes().chain(names).any(is_special);
                (is_telnet && is_lacking, "does what telnet cannot")
            }
        };
        is_lacking.then_some(why)
    }
}
