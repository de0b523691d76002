//! Where transcripts are played, what can be played there, and in which ways.

use crate::broken::Proxy;
use crate::clients::Via;
use crate::patience::Patience;
use crate::script::Script;
use crate::steps::{Needs, Step};
use std::sync::Arc;

/// Why a transcript is skipped when enough is known of a server.
pub const UNPLAYED: &str = "was not played any more, so long after the first failure";
/// Why one is skipped that somebody else's server is too slow for.
pub const TOO_LATE: &str = "was not played within half a minute: SLOW=1 plays it";

/// Where transcripts are played.
#[derive(Default)]
pub struct Theatre {
    /// A server that is running already, as HOST:PORT.
    pub server: Option<String>,
    pub via: Via,
    pub proxy: Option<Arc<Proxy>>,
    /// What takes long is played too.
    pub slow: bool,
    pub patience: Patience,
}

/// How what the transcript sends is cut into pieces.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// As the transcript says.
    AsWritten,
    /// Every byte of its own, at either end of what is long.
    ByteByByte,
    /// All that a client says until somebody else does something.
    InOnePiece,
}

#[derive(PartialEq, Eq)]
pub enum Outcome {
    Passed,
    /// It passed as written, and was not played in the other ways.
    PassedAsWritten,
    Failed(String),
    Skipped(&'static str),
}

impl Theatre {
    pub fn is_plain(&self) -> bool {
        self.server.is_none() && self.via == Via::Sockets
    }

    /// Why nothing more is to be played, if so. Who asks for what takes minutes gets all of it.
    pub fn is_exhausted(&self) -> Option<&'static str> {
        let is_hurried = self.server.is_some() && self.via == Via::Sockets;
        match self.slow {
            _ if self.patience.is_over() => Some(UNPLAYED),
            false if self.patience.is_exhausted() => Some(UNPLAYED),
            false if is_hurried && self.patience.is_late() => Some(TOO_LATE),
            _ => None,
        }
    }

    /// Why a script cannot be played here, if it cannot.
    pub fn misses(&self, script: &Script) -> Option<&'static str> {
        if script.is_slow && !self.slow {
            return Some("takes long: SLOW=1 plays it");
        }
        if self.server.is_some() && !script.options.is_empty() {
            return Some("starts the server with options");
        }
        let steps = script.written();
        // An nc whose output nobody takes does not look at its input either.
        let needs = |what| steps.iter().any(|step| step.form.needs == what);
        if self.via == Via::Nc && needs(Needs::OwnPace) && needs(Needs::HalfClose) {
            return Some("does what nc cannot");
        }
        steps.iter().find_map(|step| self.lacks(step))
    }

    /// What the step needs and is not to be had here.
    fn lacks(&self, step: &Step) -> Option<&'static str> {
        let is_foreign = self.server.is_some();
        let is_telnet = self.via == Via::Telnet;
        let (is_lacking, why) = match step.form.needs {
            Needs::Nothing | Needs::Time => (false, ""),
            Needs::Process if is_foreign => (true, "watches or ends the server's process"),
            Needs::Signal if is_foreign => (true, "watches or ends the server's process"),
            Needs::Process => (false, ""),
            Needs::Signal => (cfg!(windows), "sends a signal"),
            Needs::OurClient if !self.is_plain() => (true, "is about linechat-client"),
            Needs::OurClient => (false, ""),
            Needs::Terminal if !self.is_plain() => (true, "is about linechat-client"),
            Needs::Terminal => (!cfg!(target_os = "linux"), "needs the script(1) of Linux"),
            Needs::OwnPace if self.proxy.is_some() => {
                (true, "needs a server that nothing buffers for")
            }
            // One whose output nobody takes cannot be ended with its terminal.
            Needs::OwnPace | Needs::HalfClose | Needs::PlainOutput => {
                (is_telnet, "does what telnet cannot")
            }
            Needs::PlainInput if step.is_long() => {
                (self.via != Via::Sockets, "says more at once than this program takes")
            }
            Needs::Socket => (self.via != Via::Sockets, "does what this program cannot"),
            // It ends lines its own way, doubles the byte 255, and takes Ctrl-E, with the eighth
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

    /// The ways in which it makes sense to play a script; as written is the first.
    pub fn ways(&self, script: &Script) -> &'static [Way] {
        let is_timed = |step: &&Step| {
            use Needs::{OurClient, OwnPace, Terminal, Time};
            matches!(step.form.needs, OurClient | Terminal | OwnPace | Time)
        };
        let once = script.is_slow || script.is_large() || self.via != Via::Sockets;
        match once || script.written().iter().any(is_timed) {
            true => &[Way::AsWritten],
            false => &[Way::AsWritten, Way::ByteByByte, Way::InOnePiece],
        }
    }
}
