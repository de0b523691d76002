//! Hostile, unlucky and slow peers against the real server: what takes more than a transcript can
//! say. Every test starts a server of its own on a free port. Where something must not happen, a
//! PING that is answered shows that it has not; no test has a limit of time.
//!
//!     cargo test --release --test stress
//!     cargo test --release --test stress -- --ignored    those that need root, or a minute

// It looks into /proc, and takes the network apart.
#![cfg(target_os = "linux")]

#[path = "../suite/process.rs"]
mod process;

use process::{descriptor_limit, processor_time, signal, Printed, Server, STUCK};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

fn start(options: &str) -> Server {
    let options: Vec<_> = options.split_whitespace().map(str::to_owned).collect();
    Server::start(&options).expect("the server starts")
}

/// A server started by the shell, with `before` done first.
fn start_after(before: &str, options: &str) -> Server {
    let program = env!("CARGO_BIN_EXE_linechat-server");
    let script = format!("{before}; exec {program} {options} \"$0\"");
    Server::start_as(Command::new("sh").args(["-c", &script])).expect("the server starts")
}

/// Somebody connected to the server.
struct Person {
    lines: BufReader<TcpStream>,
    fences: u32,
}

impl Person {
    fn connect(server: &Server) -> Person {
        Person::connect_to(&server.address)
    }

    fn connect_to(address: &str) -> Person {
        let socket = TcpStream::connect(address).expect("connects");
        socket.set_nodelay(true).expect("no delay");
        socket.set_read_timeout(Some(STUCK)).expect("a time-out");
        Person { lines: BufReader::new(socket), fences: 0 }
    }

    /// Connects and joins, and forgets what is said of it.
    fn join(server: &Server, name: &str) -> Person {
        let mut person = Person::connect(server);
        person.say(&format!("NAME {name}"));
        person.until("WELCOME ");
        person
    }

    fn socket(&mut self) -> &mut TcpStream {
        self.lines.get_mut()
    }

    fn say(&mut self, line: &str) {
        self.socket().write_all(format!("{line}\n").as_bytes()).expect("the server takes a line");
    }

    /// The next line, or nothing at the end of the stream.
    fn next(&mut self) -> io::Result<Option<String>> {
        let mut line = String::new();
        match self.lines.read_line(&mut line)? {
            0 => Ok(None),
            _ => Ok(Some(line.trim_end_matches("\r\n").to_owned())),
        }
    }

    fn line(&mut self) -> String {
        self.next().expect("a line in time").expect("a line, not the end")
    }

    /// Reads up to the first line that starts so, and returns it.
    fn until(&mut self, start: &str) -> String {
        loop {
            let line = self.line();
            if line.starts_with(start) {
                return line;
            }
        }
    }

    /// Returns the lines that come before the PONG of a PING sent now.
    fn fence(&mut self) -> Vec<String> {
        self.fences += 1;
        let token = format!("fence {}", self.fences);
        self.say(&format!("PING {token}"));
        let mut lines = Vec::new();
        loop {
            match self.line() {
                line if line == format!("PONG {token}") => return lines,
                line => lines.push(line),
            }
        }
    }

    /// Whether the server has closed the connection: reads to its end.
    fn ends(mut self) -> bool {
        loop {
            match self.next() {
                Ok(Some(_)) => {}
                Ok(None) => return true,
                Err(error) => return error.kind() == io::ErrorKind::ConnectionReset,
            }
        }
    }

    fn leave(mut self) {
        self.say("QUIT");
        assert!(self.ends());
    }
}

/// Where a server listens, by the first line of its console.
fn listening_address(console: &mut impl BufRead) -> String {
    let mut first = String::new();
    console.read_line(&mut first).expect("a line");
    first.trim_end().rsplit(' ').next().expect("an address").to_owned()
}

/// Lets time pass for what only time can show: that nothing happens.
fn idle(time: Duration) {
    let (reader, _writer) = std::os::unix::net::UnixStream::pair().expect("a pair");
    reader.set_read_timeout(Some(time)).expect("a time-out");
    let _ = (&reader).read(&mut [0]);
}

#[test]
fn a_hundred_who_do_not_read_are_removed_and_their_memory_returns() {
    let server = start("");
    let mut watcher = Person::join(&server, "watcher");
    let lazy: Vec<_> = (0..100).map(|it| Person::join(&server, &format!("lazy{it}"))).collect();
    // With that many talking, 1 MiB is passed long before the ten seconds' patience ends; and a
    // watcher that reads can keep up with what the pace then lets them say, 1 MiB a second.
    let talkers: Vec<_> = (0..16).map(|it| Person::join(&server, &format!("t{it}"))).collect();
    watcher.fence();
    let before = server.memory();
    let text = "x".repeat(2000);
    let talk = |at: usize, mut talker: Person| {
        let text = text.clone();
        thread::spawn(move || {
            let mut reader = talker.socket().try_clone().expect("a second handle");
            let reading = thread::spawn(move || io::copy(&mut reader, &mut io::sink()));
            for round in 0.. {
                if writeln!(talker.socket(), "MSG {at} {round} {text}").is_err() {
                    break;
                }
            }
            let _ = reading.join();
        })
    };
    let handles: Vec<_> = talkers.into_iter().enumerate().map(|(at, it)| talk(at, it)).collect();
    // Every talker's messages arrive at the watcher, each once and in order, until all are gone.
    let mut rounds = [0; 16];
    let (mut slow, mut bytes, mut most) = (0, 0, 0);
    while slow < 100 {
        let line = watcher.line();
        let words: Vec<_> = line.split(' ').collect();
        match words.as_slice() {
            ["MSG", from, at, round, text] => {
                let at: usize = at.parse().expect("a number");
                assert_eq!((*from, *round), (&*format!("t{at}"), &*rounds[at].to_string()));
                assert_eq!(text.len(), 2000);
                rounds[at] += 1;
                bytes += line.len();
                if rounds[at] % 50 == 0 {
                    most = most.max(server.memory());
                }
            }
            ["LEFT", _, _, "slow"] => slow += 1,
            _ => assert!(line.starts_with("USERS "), "{line}"),
        }
    }
    drop(lazy);
    // 1 MiB each, and nobody was kept much longer than that takes.
    assert!(most - before < 100 * 1024 * 1024 + 16 * 1024 * 1024, "{} MiB", most >> 20);
    assert!(bytes < 4 * 1024 * 1024, "{bytes} bytes before all were removed");
    // The talkers end when the server stops, and are the only ones that are.
    let leavers = watcher.fence();
    assert!(leavers.iter().all(|line| !line.starts_with("LEFT")), "{leavers:?}");
    let after = server.memory();
    assert!(after < before + 24 * 1024 * 1024, "{} MiB, then {} MiB", before >> 20, after >> 20);
    drop(server);
    handles.into_iter().for_each(|handle| handle.join().expect("a talker ends"));
}

#[test]
fn a_flood_reaches_a_slow_reader_whole_and_delays_nobody() {
    let server = start("");
    let mut slow = Person::join(&server, "slow");
    let mut ana = Person::join(&server, "ana");
    let mut bob = Person::join(&server, "bob");
    let mut flooder = Person::join(&server, "flooder");
    let messages = 6000;
    let text = "x".repeat(1000);
    let flooding = thread::spawn(move || {
        for number in 1..=messages {
            flooder.say(&format!("MSG {number} {text}"));
        }
        flooder.fence();
        flooder
    });
    // Reads about 2 MB a second: 20 kB each hundredth.
    let reading = thread::spawn(move || {
        let mut next = 1;
        while next <= messages {
            let line = slow.until("MSG flooder ");
            assert!(line.starts_with(&format!("MSG flooder {next} ")), "expected {next}: {line}");
            next += 1;
            if next % 20 == 0 {
                idle(Duration::from_millis(10));
            }
        }
        slow
    });
    // Meanwhile two others talk, and are answered within what few turns bring.
    let (mut number, mut seen) = (0, 0);
    while seen < messages {
        number += 1;
        ana.say(&format!("PRIV @bob {number}"));
        for person in [&mut ana, &mut bob] {
            loop {
                let line = person.line();
                assert!(!line.starts_with("LEFT"), "{line}");
                if line == format!("PRIV ana {number}") || line == format!("SENT bob {number}") {
                    break;
                }
                if line.starts_with("MSG flooder ") {
                    seen = line.split(' ').nth(2).and_then(|it| it.parse().ok()).unwrap_or(seen);
                }
            }
        }
        if flooding.is_finished() && number > 50 {
            break;
        }
    }
    assert!(number > 50, "only {number} private messages went through during the flood");
    let mut slow = reading.join().expect("everything arrived in order");
    let mut flooder = flooding.join().expect("the flooder stays");
    assert!(slow.fence().is_empty());
    assert!(flooder.fence().iter().all(|line| !line.starts_with("LEFT")));
    ana.say("LIST");
    assert_eq!(ana.until("USERS"), "USERS 4 slow ana bob flooder");
}

#[test]
fn everybody_gets_everything_however_little_their_sockets_take() {
    let server = start("");
    let (talkers, messages) = (4, 4000);
    // Reads in small bites, so that the server's writes are often taken in part.
    let read = |mut person: Person, own: usize| {
        person.socket().set_nonblocking(false).expect("blocking");
        thread::spawn(move || {
            let socket = person.socket().try_clone().expect("a second handle");
            let mut lines = BufReader::with_capacity(200, socket);
            let mut next = [1; 4];
            let mut line = String::new();
            while (0..talkers).any(|at| at != own && next[at] <= messages) {
                line.clear();
                assert!(lines.read_line(&mut line).expect("a line in time") > 0);
                let words: Vec<_> = line.split(' ').collect();
                if let ["MSG", from, number, ..] = words.as_slice() {
                    let at: usize = from[1..].parse().expect("a number");
                    assert_eq!(*number, next[at].to_string(), "of {from}");
                    next[at] += 1;
                }
            }
            person
        })
    };
    let readers: Vec<_> = (0..10).map(|it| Person::join(&server, &format!("r{it}"))).collect();
    let mut speakers: Vec<_> =
        (0..talkers).map(|it| Person::join(&server, &format!("t{it}"))).collect();
    let mut handles: Vec<_> = readers.into_iter().map(|it| read(it, usize::MAX)).collect();
    let voices: Vec<_> = speakers
        .iter_mut()
        .map(|it| it.socket().try_clone().expect("a second handle"))
        .map(|mut socket| {
            thread::spawn(move || {
                for number in 1..=messages {
                    let text = "x".repeat(100 + number % 1000);
                    writeln!(socket, "MSG {number} {text}").expect("takes a line");
                }
            })
        })
        .collect();
    handles.extend(speakers.into_iter().enumerate().map(|(own, it)| read(it, own)));
    voices.into_iter().for_each(|voice| voice.join().expect("all was said"));
    handles.into_iter().for_each(|handle| drop(handle.join().expect("all arrived")));
}

#[test]
fn requests_wait_while_their_replies_do() {
    let people = (descriptor_limit() / 3).min(5000) - 1;
    let server = start("");
    let mut crowd: Vec<_> = (0..people)
        .map(|at| {
            let mut person = Person::connect(&server);
            person.say(&format!("NAME somebody-with-a-rather-long-name-{at}"));
            person
        })
        .collect();
    let mut greedy = Person::join(&server, "greedy");
    greedy.fence();
    let before = server.memory();
    let mut writer = greedy.socket().try_clone().expect("a second handle");
    let requests = 100_000;
    let asking = thread::spawn(move || {
        for _ in 0..requests / 1000 {
            writer.write_all("LIST\n".repeat(1000).as_bytes())?;
        }
        writer.flush()
    });
    // Others are served as before, and the server's memory does not grow with the requests.
    let other = crowd.last_mut().expect("a crowd");
    let mut most = 0;
    for _ in 0..200 {
        other.fence();
        most = most.max(server.memory());
    }
    assert!(most - before < 8 * 1024 * 1024, "{} KiB more", (most - before) >> 10);
    // When it reads, it gets its replies: in each roster all the names.
    for _ in 0..3 {
        let mut names = 0;
        while names < people + 1 {
            names += greedy.until("USERS ").split(' ').skip(2).count();
        }
        assert_eq!(names, people + 1);
    }
    greedy.socket().shutdown(Shutdown::Both).expect("ends");
    let _ = asking.join();
}

#[test]
fn who_sends_without_pause_does_not_keep_others_waiting() {
    let server = start("");
    let flooders: Vec<_> = (0..8).map(|at| Person::join(&server, &format!("f{at}"))).collect();
    let mut ana = Person::join(&server, "ana");
    let handles: Vec<_> = flooders
        .into_iter()
        .map(|mut flooder| {
            let mut reader = flooder.socket().try_clone().expect("a second handle");
            thread::spawn(move || io::copy(&mut reader, &mut io::sink()));
            thread::spawn(move || {
                // Empty requests cost the others nothing to receive.
                let lines = "PRIV @nobody x\n".repeat(1000);
                while flooder.socket().write_all(lines.as_bytes()).is_ok() {}
            })
        })
        .collect();
    for _ in 0..200 {
        ana.fence();
    }
    drop(server);
    handles.into_iter().for_each(|handle| handle.join().expect("a flooder ends"));
}

#[test]
fn without_descriptors_the_server_refuses_rests_and_recovers() {
    let server = start("");
    let mut ana = Person::join(&server, "ana");
    let bob = Person::join(&server, "bob");
    ana.fence();
    // Takes the limit down to what is open now. It is on the numbers, so gaps are filled first.
    let open = server.descriptors();
    let limit = open.iter().max().expect("some") + 1;
    let mut fillers: Vec<_> = (open.len()..limit).map(|_| Person::connect(&server)).collect();
    fillers.iter_mut().for_each(|person| assert!(person.line().starts_with("HELLO")));
    let id = server.child.id().to_string();
    let limited = Command::new("prlimit")
        .args(["--pid", &id, &format!("--nofile={limit}:{limit}")])
        .status()
        .expect("prlimit");
    assert!(limited.success());
    for _ in 0..50 {
        let mut extra = Person::connect(&server);
        assert!(extra.line().starts_with("ERR full "));
        assert!(extra.ends());
    }
    let before = processor_time(server.child.id());
    idle(Duration::from_millis(500));
    let used = processor_time(server.child.id()) - before;
    assert!(used < Duration::from_millis(50), "{used:?} of 500 ms idle");
    bob.leave();
    ana.until("LEFT bob");
    // Bob's place is free as soon as his connection is closed on both sides.
    loop {
        let mut eve = Person::connect(&server);
        if eve.line().starts_with("HELLO") {
            break;
        }
    }
    ana.fence();
}

#[test]
fn one_address_can_be_limited() {
    let server = start("--max-per-ip 3");
    let mut people: Vec<_> = (0..3).map(|_| Person::connect(&server)).collect();
    people.iter_mut().for_each(|person| assert!(person.line().starts_with("HELLO")));
    let mut extra = Person::connect(&server);
    assert!(extra.line().starts_with("ERR full "));
    assert!(extra.ends());
    people.pop().expect("three").leave();
    assert!(Person::connect(&server).line().starts_with("HELLO"));
}

#[test]
fn the_silent_and_the_very_slow_cost_little_and_end() {
    let server = start("--name-timeout 3");
    let many = (descriptor_limit() / 3).min(5000);
    let before = server.memory();
    let mut silent: Vec<_> = (0..many).map(|_| Person::connect(&server)).collect();
    for (at, person) in silent.iter_mut().enumerate() {
        if at % 2 == 0 {
            person.socket().write_all(b"N").expect("takes a byte");
        }
    }
    let mut ana = Person::join(&server, "ana");
    ana.fence();
    let each = (server.memory() - before) / many;
    assert!(each < 2000, "{each} bytes for each");
    for mut person in silent {
        assert!(person.line().starts_with("HELLO"));
        assert!(person.line().starts_with("ERR timeout"));
        assert!(person.ends());
    }
    ana.fence();
}

#[test]
fn resets_at_any_moment_are_only_that_connections() {
    let server = start("");
    let mut ana = Person::join(&server, "ana");
    for round in 0..200 {
        // Linux resets a connection that is closed with something unread.
        let mut victim = Person::connect(&server);
        if round % 4 > 0 {
            victim.say(&format!("NAME victim{round}"));
        }
        if round % 4 > 1 {
            victim.until("WELCOME");
            ana.say(&format!("PRIV @victim{round} x"));
            ana.say("MSG to all");
        }
        if round % 4 > 2 {
            victim.say("QUIT");
        }
        drop(victim);
        ana.say(&format!("PRIV @victim{round} still there?"));
    }
    // All are gone, and the count is right again.
    loop {
        ana.say("LIST");
        if ana.until("USERS ") == "USERS 1 ana" && ana.fence().is_empty() {
            break;
        }
    }
    assert!(server.descriptors().len() < 20);
}

#[test]
fn a_console_that_nobody_reads_does_not_stop_the_chat() {
    // The shell gives the server a pipe that is read when the test says so.
    let directory = std::env::temp_dir().join(format!("linechat-console-{}", std::process::id()));
    std::fs::create_dir_all(&directory).expect("a directory");
    let pipe = directory.join("pipe");
    let made = Command::new("mkfifo").arg(&pipe).status().expect("mkfifo");
    assert!(made.success());
    let program = env!("CARGO_BIN_EXE_linechat-server");
    let command = format!("exec {program} --verbose 127.0.0.1:0 >{}", pipe.display());
    let mut child = Command::new("sh").args(["-c", &command]).spawn().expect("starts");
    let mut console = BufReader::new(std::fs::File::open(&pipe).expect("opens"));
    let address = listening_address(&mut console);
    let mut talker = Person::connect_to(&address);
    talker.say("NAME ana");
    // More than a pipe holds, and less than the server keeps: all of it is shown when there is
    // somebody to read, though nothing else happens.
    for _ in 0..40 {
        talker.say(&format!("MSG {}", "x".repeat(3000)));
    }
    talker.fence();
    let console = Printed::by(Some(console.into_inner()));
    let mut shown = Vec::new();
    let lines = |bytes: &[u8]| bytes.iter().filter(|&&byte| byte == b'\n').count();
    while lines(&shown) < 2 + 40 {
        assert!(console.read(&mut shown, STUCK).expect("more is shown"));
    }
    // Ten times what both hold together.
    for _ in 0..400 {
        talker.say(&format!("MSG {}", "x".repeat(3000)));
    }
    talker.fence();
    // And one that goes away does not either.
    drop(console);
    talker.say("MSG nobody sees this");
    talker.fence();
    assert!(child.try_wait().expect("a status").is_none());
    child.kill().expect("ends");
    child.wait().expect("ended");
    let _ = std::fs::remove_dir_all(&directory);
}

#[test]
fn a_paused_terminal_does_not_stop_the_chat() {
    // script(1) gives the server a terminal whose other end nobody reads once its pipe is full.
    let program = env!("CARGO_BIN_EXE_linechat-server");
    let command = format!("echo $$; exec {program} --verbose 127.0.0.1:0");
    let mut child = Command::new("script")
        .args(["--quiet", "--flush", "--command", &command, "/dev/null"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("starts");
    let mut console = BufReader::new(child.stdout.take().expect("a pipe"));
    let mut process = String::new();
    console.read_line(&mut process).expect("a line");
    let address = listening_address(&mut console);
    let mut talker = Person::connect_to(&address);
    talker.say("NAME ana");
    for _ in 0..2000 {
        talker.say(&format!("MSG {}", "x".repeat(777)));
    }
    talker.fence();
    // script(1) would leave the server behind, and cannot end while its own output is not read.
    signal(process.trim().parse().expect("a number"), "KILL").expect("sent");
    child.kill().expect("ends");
    child.wait().expect("ended");
}

#[test]
fn a_stop_delivers_what_was_accepted() {
    let mut server = start("");
    let mut bob = Person::join(&server, "bob");
    let mut ana = Person::join(&server, "ana");
    bob.fence();
    let text = "x".repeat(1000);
    for number in 0..500 {
        ana.say(&format!("MSG {number} {text}"));
    }
    ana.fence();
    signal(server.child.id(), "HUP").expect("sent");
    signal(server.child.id(), "PIPE").expect("sent");
    ana.fence();
    signal(server.child.id(), "TERM").expect("sent");
    for number in 0..500 {
        assert!(bob.line().starts_with(&format!("MSG ana {number} x")));
    }
    assert!(bob.line().starts_with("BYE "));
    assert!(bob.ends());
    assert!(ana.line().starts_with("BYE "));
    assert!(ana.ends());
    assert_eq!(server.child.wait().expect("ended").code(), Some(0));
    // The port can be used again at once, though connections on it have just been closed.
    let again = Command::new(env!("CARGO_BIN_EXE_linechat-server"))
        .arg(&server.address)
        .stdout(Stdio::piped())
        .spawn();
    let mut again = again.expect("starts");
    let mut first = String::new();
    BufReader::new(again.stdout.take().expect("a pipe")).read_line(&mut first).expect("a line");
    assert!(first.contains("listening on"), "{first}");
    again.kill().expect("ends");
    again.wait().expect("ended");
}

#[test]
fn a_second_signal_stops_at_once() {
    let mut server = start("");
    let mut lazy = Person::join(&server, "lazy");
    let mut ana = Person::join(&server, "ana");
    // Somebody is owed more than the kernel takes, so that the stop has to wait.
    let text = "x".repeat(3900);
    for _ in 0..200 {
        ana.say(&format!("PRIV @lazy {text}"));
        ana.until("SENT");
    }
    signal(server.child.id(), "TERM").expect("sent");
    assert!(ana.line().starts_with("BYE "));
    signal(server.child.id(), "TERM").expect("sent");
    let status = server.child.wait().expect("ended");
    assert_eq!(status.code(), Some(128 + 15));
    lazy.socket().shutdown(Shutdown::Both).expect("ends");
}

/// A peer whose network goes away without a word: in a network namespace of its own, whose link
/// is taken down.
#[test]
#[ignore = "needs root and iproute2, and takes a minute"]
fn a_vanished_peer_is_announced() {
    let space = format!("linechat-{}", std::process::id());
    let run = |line: String| {
        let words: Vec<_> = line.split_whitespace().collect();
        Command::new(words[0]).args(&words[1..]).status().is_ok_and(|status| status.success())
    };
    let (inner, outer) =
        (format!("lci{}", std::process::id()), format!("lco{}", std::process::id()));
    assert!(run(format!("ip netns add {space}")), "cannot make a network namespace");
    let made = run(format!("ip link add {outer} type veth peer name {inner} netns {space}"))
        && run(format!("ip addr add 10.213.7.1/30 dev {outer}"))
        && run(format!("ip link set {outer} up"))
        && run(format!("ip -n {space} addr add 10.213.7.2/30 dev {inner}"))
        && run(format!("ip -n {space} link set {inner} up"));
    assert!(made, "cannot make a link");
    let program = env!("CARGO_BIN_EXE_linechat-server");
    let mut child =
        Command::new(program).arg("10.213.7.1:0").stdout(Stdio::piped()).spawn().expect("starts");
    let mut console = BufReader::new(child.stdout.take().expect("a pipe"));
    let address = listening_address(&mut console);
    let port = address.rsplit(':').next().expect("a port").to_owned();
    let mut ana = TcpStream::connect(&address).expect("connects");
    ana.set_read_timeout(Some(Duration::from_secs(75))).expect("a time-out");
    ana.write_all(b"NAME ana\n").expect("takes a line");
    let mut lines = BufReader::new(ana.try_clone().expect("a second handle"));
    let mut until = |start: &str| loop {
        let mut line = String::new();
        assert!(lines.read_line(&mut line).expect("a line within a minute") > 0);
        if line.starts_with(start) {
            return line;
        }
    };
    until("USERS 1");
    // One is idle when the link goes, and to the other something is on its way.
    let mut peers: Vec<_> = ["idle", "busy"]
        .into_iter()
        .map(|name| {
            let mut command = Command::new("ip");
            command.args(["netns", "exec", &space, "nc", "10.213.7.1", &port]);
            let mut peer =
                command.stdin(Stdio::piped()).stdout(Stdio::null()).spawn().expect("starts");
            let typed = peer.stdin.as_mut().expect("a pipe");
            writeln!(typed, "NAME {name}").expect("takes a line");
            until(&format!("JOINED {name}"));
            peer
        })
        .collect();
    assert!(run(format!("ip link set {outer} down")));
    ana.write_all(b"PRIV @busy are you there?\n").expect("takes a line");
    let begun = Instant::now();
    let mut gone = [until("LEFT "), until("LEFT ")];
    println!("both were announced after {:?}", begun.elapsed());
    gone.sort();
    assert!(gone[0].starts_with("LEFT busy ") && gone[0].ends_with(" disconnected\r\n"));
    assert!(gone[1].starts_with("LEFT idle ") && gone[1].ends_with(" disconnected\r\n"));
    child.kill().expect("ends");
    child.wait().expect("ended");
    for peer in &mut peers {
        peer.kill().expect("ends");
        peer.wait().expect("ended");
    }
    run(format!("ip link del {outer}"));
    run(format!("ip netns del {space}"));
}

#[test]
fn what_the_shell_sees() {
    let run = |arguments: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_linechat-server"))
            .args(arguments)
            .output()
            .expect("runs");
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let (status, complaint) = run(&["--nonsense"]);
    assert_eq!((status, complaint.lines().count()), (Some(2), 1));
    let server = start("");
    let (status, complaint) = run(&[&server.address]);
    assert_eq!((status, complaint.lines().count()), (Some(1), 1));
    assert!(complaint.contains(&server.address), "{complaint}");
    // The soft limit on open files is raised to the hard one.
    let server = start_after("ulimit -S -n 64", "");
    let mut crowd: Vec<_> =
        (0..100.min(descriptor_limit())).map(|_| Person::connect(&server)).collect();
    crowd.iter_mut().for_each(|person| assert!(person.line().starts_with("HELLO")));
}
