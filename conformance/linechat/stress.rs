//! What only the real operating system shows: descriptors, signals, a console, the memory of thousands
//! of connections, and a peer that vanishes. scenarios.rs has what a simulated network shows, the
//! transcripts what a few clients show. Each test starts a server of its own on a free port.
//!
//!     cargo test --release --test stress
//!     cargo test --release --test stress -- --ignored    what needs root and two minutes

// These tests read /proc, and take a network link down.
#![cfg(target_os = "linux")]

mod person;
#[path = "../suite/process.rs"]
mod process;

use person::{start, Person};
use process::{descriptor_limit, processor_time, signal, Server};
use std::io::Write;
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
    let mut ana = Person::join(&server.address, "ana");
    let bob = Person::join(&server.address, "bob");
    ana.until("JOINED bob");
    // The limit is on the numbers of descriptors, so the gaps are filled first.
    let open = server.descriptors();
    let limit = open.iter().max().expect("some") + 1;
    let _fillers = connect(&server, limit - open.len());
    let mut prlimit = Command::new("prlimit");
    prlimit.args(["--pid", &server.child.id().to_string(), &format!("--nofile={limit}:{limit}")]);
    assert!(prlimit.status().expect("prlimit").success());
    let mut next = Person::connect(&server.address);
    ana.fence();
    let before = processor_time(server.child.id());
    next.socket().set_read_timeout(Some(Duration::from_millis(500))).expect("a time-out");
    next.next().expect_err("no descriptor is left");
    let used = processor_time(server.child.id()) - before;
    assert!(used < Duration::from_millis(50), "{used:?} of 500 ms idle");
    bob.leave();
    ana.until("LEFT bob");
    next.socket().set_read_timeout(Some(process::STUCK)).expect("a time-out");
    assert!(!next.is_refused());
}

#[test]
fn slots_are_fewer_than_descriptors() {
    // The soft limit on open files is raised to the hard one.
    let server = start_by("ulimit -S -n 20; ulimit -H -n 60; exec \"$0\" \"$1\"");
    let mut people: Vec<_> = (0..60).map(|_| Person::connect(&server.address)).collect();
    let accepted = people.iter_mut().map(Person::is_refused).take_while(|refused| !refused).count();
    assert!((30..60).contains(&accepted), "{accepted} clients");
    assert!(people.swap_remove(accepted).ends());
}

#[test]
fn an_error_is_one_line_and_an_exit_status() {
    let server = start("");
    let (address, port) = (&*server.address, server.address.rsplit(':').next().expect("a port"));
    for (script, status, words) in [
        ("exec \"$0\" --nonsense", 2, ["--nonsense", "--help"]),
        ("exec \"$0\" \"$1\"", 1, [port, "another server"]),
        // No client could be served.
        ("ulimit -n 8; exec \"$0\" \"$1\"", 1, ["8 open files", "ulimit -n"]),
    ] {
        let output = Command::new("sh").args(["-c", script, PROGRAM, address]).output();
        let output = output.expect("runs");
        let complaint = String::from_utf8_lossy(&output.stderr);
        assert_eq!((output.status.code(), output.stdout), (Some(status), vec![]), "{complaint}");
        assert_eq!(complaint.lines().count(), 1, "{complaint}");
        assert!(words.iter().all(|word| complaint.contains(word)), "{complaint}");
    }
}

#[test]
fn connections_without_a_name_cost_little_memory() {
    let server = start("");
    let many = (descriptor_limit() / 3).min(5000);
    let before = server.memory();
    let mut silent = connect(&server, many);
    for person in silent.iter_mut().step_by(2) {
        person.socket().write_all(b"N").expect("takes a byte");
    }
    Person::join(&server.address, "ana").fence();
    let each = (server.memory() - before) / many;
    assert!(each < 2000, "{each} bytes for each");
}

#[test]
fn a_console_that_is_not_read_does_not_stop_the_chat() {
    // `server` leaves in the pipe what it is not asked for.
    let mut server = start("--verbose");
    let mut talker = Person::join(&server.address, "ana");
    // More than a pipe holds, and less than the server keeps: the console shows all of it as soon as
    // it is read, though nothing else happens.
    talk(&mut talker, 40, 3000);
    talker.fence();
    for number in 0..40 {
        let said = format!("ana: {number} x");
        while !server.next_line().expect("a line in time").expect("a line").contains(&said) {}
    }
    // Ten times what both hold together.
    talk(&mut talker, 400, 3000);
    talker.fence();
}

#[test]
fn a_console_that_goes_away_does_not_stop_the_chat() {
    let pipe = std::env::temp_dir().join(format!("linechat-pipe-{}", std::process::id()));
    // head(1) shows where the server listens, and ends.
    let script = "mkfifo {pipe}; head -n 1 {pipe} & exec \"$0\" --verbose \"$1\" >{pipe}";
    let mut server = start_by(&script.replace("{pipe}", &pipe.display().to_string()));
    std::fs::remove_file(&pipe).expect("removes");
    let mut talker = Person::join(&server.address, "ana");
    for _ in 0..100 {
        talker.say("MSG nobody sees this");
        talker.fence();
    }
    assert!(server.child.try_wait().expect("a status").is_none());
}

#[test]
fn a_stop_in_the_middle_of_a_turn_takes_little_memory() {
    let server = start("");
    let many = (descriptor_limit() / 3).min(1500);
    let mut crowd = connect(&server, many);
    for (number, person) in crowd.iter_mut().enumerate() {
        person.say(&format!("NAME p{number}"));
    }
    crowd.iter_mut().for_each(|person| drop(person.until("WELCOME ")));
    let before = server.peak_memory();
    // The server finds all of this, and then the request to stop, when it goes on.
    send(&server, "STOP");
    crowd[..3].iter_mut().for_each(|person| talk(person, 16, 3900));
    send(&server, "TERM");
    send(&server, "CONT");
    // The kernel shows no memory of a process that has ended.
    let mut most = before;
    while let now @ 1.. = server.peak_memory() {
        most = most.max(now);
    }
    let more = (most - before) >> 20;
    assert!(more < 64, "{more} MiB to stop while 180 KiB are pending for each of {many}");
}

#[test]
fn a_second_signal_stops_at_once() {
    let mut server = start("");
    let _lazy = Person::join(&server.address, "lazy");
    let mut ana = Person::join(&server.address, "ana");
    // Lazy takes less than is sent to it, so the stop has to wait.
    let text = "x".repeat(3900);
    for _ in 0..130 {
        ana.say(&format!("PRIV @lazy {text}"));
        ana.until("SENT");
    }
    send(&server, "TERM");
    assert!(ana.line().starts_with("BYE "));
    send(&server, "TERM");
    let status = server.child.wait().expect("ended");
    assert_eq!(status.code(), Some(128 + 15));
}

/// Returns true if ip(8) succeeds.
fn ip(arguments: &str) -> bool {
    let status = Command::new("ip").args(arguments.split(' ')).status();
    status.is_ok_and(|status| status.success())
}

/// The peers are in a network namespace of their own, whose link is taken down.
#[test]
#[ignore = "needs root and iproute2, and takes up to two minutes"]
fn a_vanished_peer_is_announced() {
    let id = std::process::id();
    let (space, inner, outer) = (format!("linechat-{id}"), format!("lci{id}"), format!("lco{id}"));
    for arguments in [
        format!("netns add {space}"),
        format!("link add {outer} type veth peer name {inner} netns {space}"),
        format!("addr add 10.213.7.1/30 dev {outer}"),
        format!("link set {outer} up"),
        format!("-n {space} addr add 10.213.7.2/30 dev {inner}"),
        format!("-n {space} link set {inner} up"),
    ] {
        assert!(ip(&arguments), "ip {arguments} fails");
    }
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
    assert!(ip(&format!("link set {outer} down")));
    ana.say("PRIV @busy are you there?");
    let begun = Instant::now();
    let mut gone = [(); 2].map(|()| {
        let line = ana.until("LEFT ");
        println!("after {:?}: {line}", begun.elapsed());
        line
    });
    gone.sort();
    for (line, name) in gone.iter().zip(["busy", "idle"]) {
        assert!(line.starts_with(&format!("LEFT {name} ")) && line.ends_with(" disconnected"));
    }
    for peer in &mut peers {
        peer.kill().expect("ends");
        peer.wait().expect("ended");
    }
    assert!(ip(&format!("link del {outer}")) && ip(&format!("netns del {space}")));
}
