//! What is tested: whose server, by which kind of client, and what of it cannot be played there.

use crate::broken::Fault;
use crate::client::Via;
use crate::forms::{Action, Needs, Step};
use crate::script::{Level, Script, LONG};
use crate::timeouts::Timeouts;
use std::sync::atomic::Ordering;

/// Why a transcript is not played.
pub const TOO_LATE: &str = "not played within half a minute: SLOW=1 plays it";
pub const SLOW: &str = "takes long: SLOW=1 plays it";
const NOT_EMPTY: &str = "not played, because clients of the last transcript are still there";

#[derive(Default)]
pub struct Target {
    /// A server that is running already, as HOST:PORT. `None`: this repository's own, a fresh one
    /// for each transcript.
    pub server: Option<String>,
    /// The program that clients use; `None`: sockets of the suite.
    pub via: Option<Via>,
    /// What a proxy in front of the server does wrong; `None`: there is no proxy.
    pub fault: Option<&'static Fault>,
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
    /// The server is this repository's, and the clients are sockets of the suite.
    pub fn is_plain(&self) -> bool {
        self.server.is_none() && self.via.is_none()
    }

    /// The level `linechat` is not played against another server unless it is asked for.
    pub fn has_level(&self, level: Level) -> bool {
        match self.levels.as_slice() {
            [] => level != Level::Linechat || self.server.is_none(),
            levels => levels.contains(&level),
        }
    }

    /// Why nothing more is to be played; `None` if the run goes on. With SLOW=1 everything is
    /// played, however long it takes.
    pub fn is_exhausted(&self) -> Option<&'static str> {
        let has_limit = self.server.is_some() || self.timeouts.has_failed.load(Ordering::Relaxed);
        match self.timeouts.is_over.load(Ordering::Relaxed) {
            true => Some(NOT_EMPTY),
            false => (self.timeouts.is_late() && has_limit && !self.slow).then_some(TOO_LATE),
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
        script.steps.iter().find_map(|step| self.lacks(step))
    }

    /// Why a step cannot be played here; `None` if it can.
    fn lacks(&self, step: &Step) -> Option<&'static str> {
        // telnet ends lines its own way, doubles the byte 255, takes Ctrl-E, with the eighth bit or
        // without, as a command, and loses the last of very many bytes when the server closes.
        let is_special = |byte| matches!(byte, b'\r' | 0xff | 0x05 | 0x85);
        let sends = matches!(step.action, Action::Send | Action::BeInTheRoom);
        let sent = step.bytes.iter().copied().chain(step.who.iter().flat_map(|name| name.bytes()));
        let is_plain = step.needs != Needs::PlainClient
            && !(sends && (step.bytes.len() > LONG || sent.into_iter().any(is_special)));
        match step.needs {
            Needs::Process if self.server.is_some() => Some("watches or ends the server's process"),
            Needs::OurClient | Needs::Terminal if !self.is_plain() => {
                Some("is about linechat-client")
            }
            Needs::Terminal if !cfg!(target_os = "linux") => Some("needs the script(1) of Linux"),
            Needs::DirectSocket if self.via.is_some() || self.fault.is_some() => {
                Some("does what this program cannot")
            }
            _ if self.via == Some(Via::Telnet) && !is_plain => Some("does what telnet cannot"),
            _ => None,
        }
    }
}
