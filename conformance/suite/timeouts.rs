//! How long the suite waits for what may never come. A right server on a busy machine may be late,
//! so the time-outs follow what has been seen: they are multiples of the slowest PONG so far.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

const LEAST: Duration = Duration::from_millis(250);
const MOST: Duration = Duration::from_secs(3);
/// Of the slowest PONG.
const MULTIPLE: u32 = 8;
/// A PONG is waited for longer: how slow PONGs are may be about to be learned.
const FOR_PONG: u32 = 4;
/// A program has to be started, and linechat-client shows things in its own time.
const FOR_PROGRAMS: u32 = 12;
/// After the first failure others are looked for during this time.
const AFTER_A_FAILURE: Duration = Duration::from_secs(12);
/// All transcripts together may take this long with somebody else's server.
const FOR_ALL: Duration = Duration::from_secs(28);

pub struct Timeouts {
    /// Microseconds that the slowest PONG took.
    slowest: AtomicU64,
    begun: Instant,
    first_failure: OnceLock<Instant>,
    is_over: AtomicBool,
}

impl Default for Timeouts {
    fn default() -> Timeouts {
        Timeouts::like(Duration::ZERO)
    }
}

impl Timeouts {
    /// For a server whose slowest PONG so far took this long.
    pub fn like(slowest: Duration) -> Timeouts {
        Timeouts {
            slowest: AtomicU64::new(slowest.as_micros() as u64),
            begun: Instant::now(),
            first_failure: OnceLock::new(),
            is_over: AtomicBool::new(false),
        }
    }

    pub fn slowest(&self) -> Duration {
        Duration::from_micros(self.slowest.load(Ordering::Relaxed))
    }

    pub fn saw_pong_after(&self, took: Duration) {
        self.slowest.fetch_max(took.as_micros() as u64, Ordering::Relaxed);
    }

    /// For a line, or the end of a connection, that no fence tells of.
    pub fn line(&self) -> Duration {
        (self.slowest() * MULTIPLE).clamp(LEAST, MOST)
    }

    /// For a PONG behind this many requests, which the server may answer together.
    pub fn pong_behind(&self, requests: usize) -> Duration {
        let requests = u32::try_from(requests).unwrap_or(u32::MAX);
        (self.line() * FOR_PONG).min(MOST) + self.slowest().saturating_mul(requests)
    }

    pub fn program(&self) -> Duration {
        self.line() * FOR_PROGRAMS
    }

    pub fn failed(&self) {
        self.first_failure.get_or_init(Instant::now);
    }

    /// Nothing more is to be played.
    pub fn end(&self) {
        self.is_over.store(true, Ordering::Relaxed);
    }

    pub fn is_over(&self) -> bool {
        self.is_over.load(Ordering::Relaxed)
    }

    pub fn is_late(&self) -> bool {
        self.begun.elapsed() > FOR_ALL
    }

    /// Failures have been looked for long enough.
    pub fn is_exhausted(&self) -> bool {
        self.first_failure.get().is_some_and(|first| first.elapsed() > AFTER_A_FAILURE)
    }
}
