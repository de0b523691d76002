//! How long the suite waits for what may never come. Nothing that arrives is ever waited for with a
//! sleep; this is only about giving up.
//!
//! A right server on a busy machine may be late, so patience follows what has been seen: a multiple
//! of the slowest PONG so far. A wrong server must not cost it again and again: once it was spent
//! in full on one cause, little is left for the next time.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Never less than this.
const LEAST: Duration = Duration::from_millis(250);
/// Never more than this, however slow the PONGs.
const MOST: Duration = Duration::from_secs(3);
/// Of the slowest PONG.
const MULTIPLE: u32 = 8;
/// What is left for a cause on which patience was spent before, as a part of it.
const ONCE_MORE: u32 = 5;
const FOR_PONG: u32 = 4;
/// A program has to be started, and a person's client shows things in its own time.
const FOR_PROGRAMS: u32 = 12;
/// Failures are looked for so long after the first one; then what is left is not played any more.
const AFTER_A_FAILURE: Duration = Duration::from_secs(12);
/// All together may take so long with somebody else's server.
const FOR_ALL: Duration = Duration::from_secs(28);

/// The cause that is a missing PONG.
pub const PONG: &str = "PONG";

pub struct Patience {
    /// Microseconds that the slowest PONG took.
    slowest: AtomicU64,
    spent: Mutex<BTreeSet<&'static str>>,
    begun: Instant,
    first_failure: Mutex<Option<Instant>>,
    is_over: AtomicBool,
}

impl Default for Patience {
    fn default() -> Patience {
        Patience::like(Duration::ZERO)
    }
}

impl Patience {
    /// With a server whose slowest PONG so far took this long.
    pub fn like(slowest: Duration) -> Patience {
        Patience {
            slowest: AtomicU64::new(slowest.as_micros() as u64),
            spent: Mutex::default(),
            begun: Instant::now(),
            first_failure: Mutex::default(),
            is_over: AtomicBool::new(false),
        }
    }

    pub fn slowest(&self) -> Duration {
        Duration::from_micros(self.slowest.load(Ordering::Relaxed))
    }

    pub fn saw_pong_after(&self, took: Duration) {
        self.slowest.fetch_max(took.as_micros() as u64, Ordering::Relaxed);
    }

    /// How long to wait now for what this names.
    pub fn with(&self, cause: &'static str) -> Duration {
        let whole = (self.slowest() * MULTIPLE).clamp(LEAST, MOST);
        match self.spent.lock().unwrap().contains(cause) {
            true => whole / ONCE_MORE,
            false => whole,
        }
    }

    /// For a PONG itself there is more: how slow they are here may be about to be learned. Behind
    /// many requests it comes when they have been dealt with, which a server may answer together.
    pub fn with_pong_behind(&self, requests: usize) -> Duration {
        let requests = u32::try_from(requests).unwrap_or(u32::MAX);
        (self.with(PONG) * FOR_PONG).min(MOST) + self.slowest().saturating_mul(requests)
    }

    pub fn with_programs(&self, cause: &'static str) -> Duration {
        self.with(cause) * FOR_PROGRAMS
    }

    /// It was waited for in vain.
    pub fn is_spent_on(&self, cause: &'static str) {
        self.spent.lock().unwrap().insert(cause);
    }

    pub fn failed(&self) {
        self.first_failure.lock().unwrap().get_or_insert_with(Instant::now);
    }

    /// Nobody cares any more for what is still being played.
    pub fn end(&self) {
        self.is_over.store(true, Ordering::Relaxed);
    }

    pub fn is_over(&self) -> bool {
        self.is_over.load(Ordering::Relaxed)
    }

    /// All together has taken long enough.
    pub fn is_late(&self) -> bool {
        self.begun.elapsed() > FOR_ALL
    }

    /// Enough is known of this server.
    pub fn is_exhausted(&self) -> bool {
        let first = *self.first_failure.lock().unwrap();
        first.is_some_and(|first| first.elapsed() > AFTER_A_FAILURE)
    }
}
