//! What only the real operating system shows: descriptors, signals, a console, the memory of thousands
//! of connections, resets, and a peer that vanishes. scenarios.rs has what a simulated network shows,
//! the transcripts what a few clients show. Each test starts a server of its own on a free port.
//!
//!     cargo test --release --test stress
//!     cargo test --release --test stress -- --ignored    what needs root and two minutes

// These tests read /proc, and take a network link down.
#![cfg(target_os = "linux")]

mod history;
mod person;
#[path = "../suite/process.rs"]
mod process;

use history::{History, Received};
use person::{start, Person};
use process::{descriptor_limit, processor_time, signal, Server, STUCK};
use std::io::Write;
use std::net::Shutdown;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

const PROGRAM: &str = env!("CARGO_BIN_EXE_linechat-server");

/// Runs a shell script in which `$0` is the program and `$1` a free port of 127.0.0.1.
fn start_by(script: &str) -> Server {
    Server::start_as(Command::new("sh").args(["-c", script, PROGRAM])).expect("the server starts")
}

/// Opens connections, all of which the server accepts.
fn connect(server: &Server, count: usize) -> Vec<Person> {
    let mut people: Vec<_> = (0..count).map(|_| Person::connect(&server.address)).collect();
    assert!(people.iter_mut().all(|person| !person.is_refused()));
    people
}

/// Connects clients that join as p0, p1 and so on.
fn join(server: &Server, count: usize) -> Vec<Person> {
    let mut people = connect(server, count);
    for (number, person) in people.iter_mut().enumerate() {
        person.say(&format!("NAME p{number}"));
    }
    people.iter_mut().for_each(|person| drop(person.until("WELCOME ")));
    people
}

/// Sends `count` messages: each is its number and `length` bytes.
fn talk(person: &mut Person, count: usize, length: usize) {
    let text = "x".repeat(length);
    (0..count).for_each(|number| person.say(&format!("MSG {number} {text}")));
}

fn send(server: &Server, name: &str) {
    signal(server.child.id(), name).expect("a signal is sent");
}

#[test]
fn without_descriptors_the_listener_rests_and_recovers() {
    let server = start("");
    let limit_descriptors = |limit: usize| {
        let process = server.child.id().to_string();
        let mut prlimit = Command::new("prlimit");
        prlimit.args(["--pid", &process, &format!("--nofile={limit}:")]);
        assert!(prlimit.status().expect("prlimit").success());
    };
    let mut ana = Person::join(&server.address, "ana");
    limit_descriptors(3);
    let mut next = Person::connect(&server.address);
    ana.fence();
    let before = processor_time(server.child.id());
    next.socket().set_read_timeout(Some(Duration::from_millis(500))).expect("a time-out");
    next.next().expect_err("no descriptor is left");
    let used = processor_time(server.child.id()) - before;
    assert!(used < Duration::from_millis(50), "{used:?} of 500 ms idle");
    limit_descriptors(100);
    next.socket().set_read_timeout(Some(STUCK)).expect("a time-out");
    assert!(!next.is_refused());
}

#[test]
fn slots_are_fewer_than_descriptors() {
    // The soft limit on open files is raised to the hard one.
    let server = start_by("ulimit -S -n 20; ulimit -H -n 60; exec \"$0\" \"$1\"");
    let mut people: Vec<_> = (0..60).map(|_| Person::connect(&server.address)).collect();
    let accepted = people.iter_mut().map(Person::is_refused).take_while(|refused| !refused).count();
    assert!((30..60).contains(&accepted), "{accepted} clients");
    people.swap_remove(accepted).rest();
}

#[test]
fn a_server_that_could_serve_nobody_says_so() {
    // A server that starts is ended, and has another status.
    let script = "ulimit -n 8; exec timeout 30 \"$0\" 127.0.0.1:0";
    let output = Command::new("sh").args(["-c", script, PROGRAM]).output().expect("sh");
    let complaint = String::from_utf8_lossy(&output.stderr);
    assert_eq!((output.status.code(), output.stdout), (Some(1), vec![]), "{complaint}");
    assert_eq!(complaint.lines().count(), 1, "{complaint}");
    let is_helpful = complaint.contains("8 open files") && complaint.contains("ulimit -n");
    assert!(is_helpful, "{complaint}");
}

#[test]
fn connections_without_a_name_cost_little_memory() {
    let server = start("");
    let many = (descriptor_limit() / 3).min(5000);
    let before = server.memory("VmRSS:");
    let mut silent = connect(&server, many);
    for person in silent.iter_mut().step_by(2) {
        person.socket().write_all(b"N").expect("takes a byte");
    }
    Person::join(&server.address, "ana").fence();
    let each = (server.memory("VmRSS:") - before) / many;
    assert!(each < 2000, "{each} bytes for each");
}

/// In each round people join, talk, and leave in every way. The observer says nothing, so it receives
/// the history of the room. Everybody else must receive the part of it that history.rs says.
#[test]
fn people_who_come_and_go_leave_nothing_behind() {
    let server = start("");
    let mut observer = Person::join(&server.address, "observer");
    let (memory, open) = (server.memory("VmRSS:"), server.descriptors().len());
    let many = (descriptor_limit() / 3).min(400);
    for _ in 0..10 {
        let mut people = join(&server, many);
        // More than fits into a socket, and what is pending is less than the soft limit.
        people[..25].iter_mut().for_each(|person| talk(person, 3, 3900));
        let leave = |(number, mut person): (usize, Person)| {
            match number % 4 {
                0 => person.say("QUIT"),
                1 => person.socket().shutdown(Shutdown::Write).expect("half-closes"),
                2 => return person.fence(),
                _ => {
                    // Much is unread, so the kernel resets the connection.
                    person.say("MSG last words");
                    return Vec::new();
                }
            }
            person.rest()
        };
        let received: Vec<_> = people.into_iter().enumerate().map(leave).collect();

        let mut history = History::default();
        while history.members.values().filter(|it| it.left.is_some()).count() < many {
            history.push(&observer.line());
        }
        observer.fence().iter().for_each(|line| history.push(line));
        for (number, lines) in received.iter().enumerate() {
            let name = format!("p{number}");
            let mut received = Received::new(&name);
            let lines = lines.iter().filter(|line| !line.starts_with("BYE "));
            lines.for_each(|line| received.line(line, &history));
            assert!(number % 4 > 1 || received.next(&history).is_empty(), "{name} misses some");
            let said = 3 * usize::from(number < 25) + usize::from(number % 4 == 3);
            assert_eq!(history.members[&name].said.len(), said, "messages of {name}");
        }
        let since = Instant::now();
        while server.descriptors().len() != open {
            assert!(since.elapsed() < STUCK, "still open: {:?}", server.descriptors());
        }
    }
    let more = server.memory("VmRSS:").saturating_sub(memory) >> 10;
    assert!(more < 4096, "the server keeps {more} KiB");
}

#[test]
fn a_console_that_is_not_read_or_goes_away_does_not_stop_the_chat() {
    // sed(1) is the console. It waits while `server` leaves its output in the pipe, and then ends.
    let pipe = std::env::temp_dir().join(format!("linechat-pipe-{}", std::process::id()));
    let script =
        "mkfifo {pipe}; sed --unbuffered 200q {pipe} & exec \"$0\" --verbose \"$1\" >{pipe}";
    let mut server = start_by(&script.replace("{pipe}", &pipe.display().to_string()));
    std::fs::remove_file(&pipe).expect("removes");
    let mut talker = Person::join(&server.address, "ana");
    // More than pipes hold, and less than the server keeps: the console shows all of it as soon as it
    // is read, though nothing else happens.
    talk(&mut talker, 80, 3000);
    talker.fence();
    for number in 0..80 {
        let said = format!("ana: {number} x");
        while !server
            .next_line_within(STUCK)
            .expect("a line in time")
            .expect("a line")
            .contains(&said)
        {}
    }
    // More than the pipes and the server hold together.
    talk(&mut talker, 600, 3000);
    talker.fence();
    while server.next_line_within(STUCK).expect("a line in time").is_some() {}
    for _ in 0..100 {
        talker.say("MSG nobody sees this");
        talker.fence();
    }
    assert!(server.child.try_wait().expect("a status").is_none());
}

#[test]
fn a_stop_takes_little_memory_though_much_is_pending() {
    let server = start("");
    let many = (descriptor_limit() / 3).min(300);
    let mut crowd = join(&server, many);
    // The others read nothing, and their sockets take about half of this.
    talk(&mut crowd[0], 100, 3900);
    crowd[0].fence();
    let before = server.memory("VmHWM:");
    send(&server, "TERM");
    // The kernel shows no memory of a process that has ended.
    let mut most = before;
    while let now @ 1.. = server.memory("VmHWM:") {
        most = most.max(now);
    }
    let more = (most - before) >> 20;
    assert!(more < 8, "{more} MiB to stop while much is pending for each of {many}");
}

#[test]
fn a_second_signal_stops_at_once() {
    let mut server = start("");
    let _lazy = Person::join(&server.address, "lazy");
    let mut ana = Person::join(&server.address, "ana");
    // Lazy takes less than is sent to it, so the stop has to wait.
    talk(&mut ana, 130, 3900);
    ana.fence();
    send(&server, "TERM");
    ana.until("BYE ");
    send(&server, "TERM");
    let status = server.child.wait().expect("ended");
    assert_eq!(status.code(), Some(128 + 15));
}

/// Runs commands, all of which succeed.
fn shell(script: &str) {
    let status = Command::new("sh").args(["-exc", script]).status().expect("starts");
    assert!(status.success(), "{script}");
}

/// The peers are in a network namespace of their own, whose link is taken down.
#[test]
#[ignore = "needs root and iproute2, and takes up to two minutes"]
fn a_vanished_peer_is_announced() {
    let id = std::process::id();
    let (space, inner, outer) = (format!("linechat-{id}"), format!("lci{id}"), format!("lco{id}"));
    shell(&format!(
        "ip netns add {space}
         ip link add {outer} type veth peer name {inner} netns {space}
         ip addr add 10.213.7.1/30 dev {outer}
         ip link set {outer} up
         ip -n {space} addr add 10.213.7.2/30 dev {inner}
         ip -n {space} link set {inner} up"
    ));
    let server = start_by("exec \"$0\" 10.213.7.1:0");
    let mut ana = Person::join(&server.address, "ana");
    ana.socket().set_read_timeout(Some(Duration::from_secs(75))).expect("a time-out");
    // When the link goes down, a line is on its way to busy, and nothing to idle. Idle is announced
    // a minute later if the LEFT of busy is sent to it before the kernel gives it up.
    let mut peers = ["idle", "busy"].map(|name| {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &space, "nc"]).args(server.address.split(':'));
        let mut peer = command.stdin(Stdio::piped()).stdout(Stdio::null()).spawn().expect("starts");
        writeln!(peer.stdin.as_mut().expect("a pipe"), "NAME {name}").expect("takes a line");
        ana.until(&format!("JOINED {name}"));
        peer
    });
    shell(&format!("ip link set {outer} down"));
    ana.say("PRIV @busy are you there?");
    let gone = [ana.until("LEFT "), ana.until("LEFT ")].join("; ");
    assert!(gone.contains("LEFT busy ") && gone.contains("LEFT idle "), "{gone}");
    assert_eq!(gone.matches(" disconnected").count(), 2, "{gone}");
    for peer in &mut peers {
        peer.kill().expect("ends");
        peer.wait().expect("ended");
    }
    shell(&format!("ip link del {outer}; ip netns del {space}"));
}
