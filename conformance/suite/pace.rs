//! The steps in which time matters: time-outs, floods, and clients that read slowly or not at all.

use crate::clients::{Line, SLICE};
use crate::stage::{Beat, Stage};
use crate::text::Pattern;
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

/// More than kernels, two on the way in and two on the way out, and server take over for one who does
/// not read, in bytes.
const FLOOD: usize = 32 * 1024 * 1024;
/// A slow server is not awaited for so much.
const FLOODED: Duration = Duration::from_secs(2);
/// Nor where time-outs and limits are checked.
const FLOODED_AT_LEISURE: Duration = Duration::from_secs(20);
/// A sender that can send only little in this time is made to wait. When nothing has been read for 200
/// ms Linux may still take over some more.
const MADE_TO_WAIT: Duration = Duration::from_millis(300);
/// In this time the budget, and what Linux takes over, are little too, but a slow server takes more.
const MADE_TO_WAIT_AT_LEISURE: Duration = Duration::from_secs(1);
const LITTLE: usize = 256 * 1024;
/// One whose answers nobody reads is, when it can send nothing for so long.
const TAKES_NO_MORE: Duration = Duration::from_millis(1500);
/// More than kernels take over of requests and of replies together, in bytes.
const NOBODY_KEEPS: usize = 64 * 1024 * 1024;
/// How even the pace of one is who reads slowly.
const READS_A_SECOND: u32 = 16;
/// For a time-out, beside a tenth of it.
const GRACE: Duration = Duration::from_secs(2);

/// Private messages that are told before it is seen how long their answers take: with the budget 1.2
/// seconds, without it much less even where the server is slow.
const TOLD_AT_ONCE: usize = 20;
const BEHIND: Duration = Duration::from_secs(1);
/// More of them than kernels and a right server keep.
const MOST_TOLD: usize = 8000;

impl Stage<'_> {
    /// The line comes so many seconds after something was last done, give or take a tenth.
    pub fn receives_after(&mut self, name: &str, beat: Beat) -> Result<(), String> {
        let seconds = Duration::from_secs(beat.step.number as u64);
        let (since, late) = (self.last_act, seconds.mul_f64(1.1) + GRACE);
        while !self.find(name)?.received.contains(&b'\n') {
            self.goes_on()?;
            if self.find(name)?.is_closed || since.elapsed() > late {
                let after = since.elapsed().as_secs_f64();
                return Err(format!("nothing after {after:.1} s: {}", self.find(name)?.unread()));
            }
            self.find(name)?.read(SLICE);
        }
        let (took, line) = (since.elapsed(), self.find(name)?.unread());
        match took {
            _ if took < seconds.mul_f64(0.9) => {
                Err(format!("{:.1} s are too early: {line}", took.as_secs_f64()))
            }
            _ if took > late => Err(format!("{:.1} s are too late: {line}", took.as_secs_f64())),
            _ => self.receives(name, beat),
        }
    }

    /// They say this again and again from now on, and take no further part; the transcript goes on
    /// once the server makes them wait, or has taken enough.
    pub fn floods(&mut self, beat: Beat) -> Result<(), String> {
        let sent = Arc::new(AtomicUsize::new(0));
        for name in &beat.step.who {
            self.fence_all_but(name)?;
            let (line, counted) = (self.bytes(beat), sent.clone());
            let (mut to_server, mut from_server) = self.give_away(name)?;
            // Both end with the connection.
            thread::spawn(move || io::copy(&mut from_server, &mut io::sink()));
            thread::spawn(move || {
                while to_server.write_all(&line).is_ok() {
                    counted.fetch_add(line.len(), Ordering::Relaxed);
                }
            });
        }
        let (mut seen, begun) = (0, Instant::now());
        let (limit, slice) = match self.theatre.slow {
            true => (FLOODED_AT_LEISURE, MADE_TO_WAIT_AT_LEISURE),
            false => (FLOODED, MADE_TO_WAIT),
        };
        while seen < FLOOD * beat.step.who.len() && begun.elapsed() < limit {
            self.pass_time(slice)?;
            // One that is only busy has taken more by the time that it has served others.
            self.serve_others(&beat.step.who[0])?;
            let before = std::mem::replace(&mut seen, sent.load(Ordering::Relaxed));
            if seen - before < LITTLE {
                break;
            }
        }
        // A slow server needs its time to take what kernels take over.
        self.last_act = Instant::now();
        Ok(())
    }

    /// Takes nothing, while somebody writes to this one until the budget makes that one wait, which
    /// shows that the server keeps more than the soft limit. Kernels keep more before that, how much
    /// is theirs to say.
    pub fn falls_behind(&mut self, name: &str, beat: Beat) -> Result<(), String> {
        self.stops_reading(name, beat)?;
        let teller = &beat.step.word;
        let text = "x".repeat(3900);
        let mut took = Duration::ZERO;
        while took < BEHIND {
            if self.told.len() > MOST_TOLD {
                return Err(format!("{teller} can tell {name} whatever there is and never waits"));
            }
            let since = Instant::now();
            let numbers = self.told.len()..self.told.len() + TOLD_AT_ONCE;
            for number in numbers.clone() {
                self.find(teller)?.send(format!("PRIV @{name} {number} {text}\n").as_bytes());
                let line = format!("PRIV {teller} {number} {text}");
                self.told.push(Pattern(vec![line.into_bytes()]));
            }
            for number in numbers {
                let line = format!("SENT {name} {number} {text}");
                self.look_for(teller, &Pattern(vec![line.into_bytes()]))?;
            }
            took = since.elapsed();
        }
        Ok(())
    }

    /// Receives what it has fallen behind.
    pub fn receives_all_told(&mut self, name: &str, _: Beat) -> Result<(), String> {
        std::mem::take(&mut self.told).iter().try_for_each(|line| self.look_for(name, line))
    }

    /// Takes so much from now on, whatever it is, and no more, and takes no further part.
    pub fn reads_slowly(&mut self, name: &str, beat: Beat) -> Result<(), String> {
        self.prepare_to_leave(name)?;
        let (_, mut from_server) = self.give_away(name)?;
        let mut buffer = vec![0; beat.step.number * 1024 / READS_A_SECOND as usize];
        thread::spawn(move || {
            let start = Instant::now();
            for number in 1.. {
                if from_server.read_exact(&mut buffer).is_err() {
                    break;
                }
                // Late once is not slower for ever.
                let next = Duration::from_secs(1) * number / READS_A_SECOND;
                thread::sleep(next.saturating_sub(start.elapsed()));
            }
        });
        Ok(())
    }

    /// The connection of one whom threads speak and listen for, until it ends.
    fn give_away(&mut self, name: &str) -> Result<(TcpStream, TcpStream), String> {
        let client = self.find(name)?;
        client.is_stalled = true;
        let Line::Socket(socket) = &client.line else {
            return Err(format!("{name} is not a socket"));
        };
        match (socket.try_clone(), socket.try_clone()) {
            (Ok(one), Ok(other)) => {
                let _ = one.set_read_timeout(None).and_then(|()| one.set_write_timeout(None));
                Ok((one, other))
            }
            _ => Err("no more descriptors".to_owned()),
        }
    }

    /// Asks without reading until the server takes no more; then every answer must come.
    pub fn must_wait(&mut self, name: &str, beat: Beat) -> Result<(), String> {
        let line = self.bytes(beat);
        let client = self.find(name)?;
        let Line::Socket(socket) = &mut client.line else {
            return Err(format!("{name} is not a socket"));
        };
        let (mut asked, mut since) = (0, Instant::now());
        while since.elapsed() < TAKES_NO_MORE {
            if asked > NOBODY_KEEPS {
                return Err(format!("{asked} bytes were taken, though nobody reads the answers"));
            }
            if let Ok(length) = socket.write(&line[asked % line.len()..]) {
                (asked, since) = (asked + length, Instant::now());
            }
        }
        client.send(&line[asked % line.len()..]);
        let answer = [b"PONG", line[b"PING".len()..].trim_ascii_end()].concat();
        let pattern = Pattern(vec![answer]);
        (0..asked.div_ceil(line.len())).try_for_each(|_| self.look_for(name, &pattern))
    }

    /// So long after what each has sent last the server has dropped the connection, and after three
    /// quarters of that time it has not.
    pub fn are_cut_off(&mut self, beat: Beat) -> Result<(), String> {
        let time = Duration::from_secs(beat.step.number as u64);
        let moments = [(time * 3 / 4, true), (time.mul_f64(1.1) + GRACE, false)];
        for (after, is_right) in moments {
            for name in &beat.step.who {
                let since = self.find(name)?.last_sent;
                self.pass_time(after.saturating_sub(since.elapsed()))?;
                match self.find(name)?.is_heard()? {
                    is_heard if is_heard == is_right => {}
                    true => return Err(format!("{name}'s connection is still there")),
                    false => {
                        let early = since.elapsed().as_secs_f64();
                        return Err(format!("{name}'s connection is no more after {early:.1} s"));
                    }
                }
            }
        }
        Ok(())
    }

    pub fn time_passes(&mut self, beat: Beat) -> Result<(), String> {
        self.pass_time(Duration::from_secs(beat.step.number as u64))
    }

    fn pass_time(&mut self, time: Duration) -> Result<(), String> {
        let since = Instant::now();
        while since.elapsed() < time {
            self.goes_on()?;
            thread::sleep(SLICE);
        }
        Ok(())
    }
}
