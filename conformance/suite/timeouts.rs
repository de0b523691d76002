//! How long the suite waits for what may never come. A right server on a busy machine may be late, so
//! the time-outs are multiples of the slowest PONG so far.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

const LEAST: Duration = Duration::from_secs(1);
const MOST: Duration = Duration::from_secs(3);
/// Of the slowest PONG.
const MULTIPLE: u32 = 32;
/// Of the time-out for the server: programs have to be started.
const FOR_PROGRAMS: u32 = 6;
/// Transcripts against another server, or after a failure, begin within this time.
const FOR_ALL: Duration = Duration::from_secs(28);

#[derive(Default)]
pub struct Timeouts {
    /// Microseconds that the slowest PONG took.
    slowest: AtomicU64,
    /// When the first transcript was about to begin.
    begun: OnceLock<Instant>,
    pub has_failed: AtomicBool,
    /// The server does not become empty, so nothing more can be played.
    pub is_over: AtomicBool,
}

impl Timeouts {
    pub fn saw_pong_after(&self, took: Duration) {
        self.slowest.fetch_max(took.as_micros() as u64, Ordering::Relaxed);
    }

    /// For a line, a PONG, or the end of a connection.
    pub fn server(&self) -> Duration {
        let slowest = Duration::from_micros(self.slowest.load(Ordering::Relaxed));
        (slowest * MULTIPLE).clamp(LEAST, MOST)
    }

    /// For what a program does.
    pub fn program(&self) -> Duration {
        self.server() * FOR_PROGRAMS
    }

    pub fn is_late(&self) -> bool {
        self.begun.get_or_init(Instant::now).elapsed() > FOR_ALL
    }
}
