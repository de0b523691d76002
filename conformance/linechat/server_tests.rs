//! Tests of server.rs, part by part: what neither a transcript nor the simulation shows, and the calls
//! of the real operating system. They are in the server's own module, so that they see all of it.

use super::*;
use std::net::{TcpListener, TcpStream};
#[cfg(target_os = "linux")]
use std::process::{Command as Process, Stdio};

// 1. The wire

/// All that a decoder finds in a stream, as text. It must be the same wherever the stream is cut.
/// The decoder keeps no memory after a line, and little while it skips one.
fn decode(stream: &[u8]) -> Vec<String> {
    let decode_pieces = |pieces: [&[u8]; 2]| {
        let (mut decoder, mut found) = (Decoder::default(), Vec::new());
        for mut piece in pieces {
            while let Some(decoded) = decoder.next(&mut piece) {
                found.push(match decoded {
                    Decoded::Line(line) => {
                        assert_eq!(decoder.line.capacity(), 0);
                        line.escape_ascii().to_string()
                    }
                    Decoded::TooLong => "too long".to_owned(),
                    Decoded::TelnetAnswer(answer) => format!("{answer:?}"),
                });
            }
            assert!(piece.is_empty() && decoder.line.capacity() < 4 * MAX_REQUEST);
        }
        found
    };
    let whole = decode_pieces([stream, b""]);
    for cut in (0..stream.len()).rev().take(100) {
        assert_eq!(decode_pieces([&stream[..cut], &stream[cut..]]), whole, "cut at {cut}");
    }
    whole
}

#[test]
fn lines_do_not_depend_on_how_the_stream_is_cut() {
    let stream = [
        b"MSG a\r\n\nMSG \xff\xfd\n b\x08c\xff\xfa\x01\n\xf0x\xff\xff\xf0x\xff\xf0\r\0".as_slice(),
        b"d\xff\xff\r\xff\xf1\n\0\n\xc3\xa9\x7fy\xff\xff\x7f\xff\xfbA\xff\xfcB\xff\xfeCe\r\r\n",
    ];
    let found = ["MSG a", "[255, 252, 10]", "MSG  c", "d\\xff", "\\x00", "[255, 254, 65]", "ye\\r"];
    assert_eq!(decode(&stream.concat()), found);
}

#[test]
fn a_line_is_too_long_with_byte_4001_of_its_text() {
    let full = "x".repeat(MAX_REQUEST);
    // Neither the ending nor telnet commands nor erased characters count.
    for (end, found) in [
        (b"".as_slice(), vec![]),
        (b"\r", vec![]),
        (b"\r\n", vec![&*full]),
        (b"\r\0", vec![&full]),
        (b"\xff\xf1\x08x\r\n", vec![&full]),
        (b"\r\xff\xf1\0", vec![&full]),
        (b"\r\x08\n", vec![&full]),
        (b"y", vec!["too long"]),
        (b"\ry", vec!["too long"]),
        (b"\r\r", vec!["too long"]),
        (&[b'y'; 5 * MAX_REQUEST], vec!["too long"]),
        (b"\x08yz", vec!["too long"]),
        // In the skipped rest telnet is answered, erasing does nothing, and CR NUL ends it.
        (b"xx\xff\xfd\x06\0\r\x08\x08\0next\n", vec!["too long", "[255, 252, 6]", "next"]),
        (b"\x08\ryz\x08\x08\0\nnext\n", vec!["too long", "next"]),
    ] {
        assert_eq!(decode(&[full.as_bytes(), end].concat()), found, "{}", end.escape_ascii());
    }
}

#[test]
fn names_hold_no_character_that_the_document_lists() {
    // Hexadecimal numbers and ranges up to "and".
    let names = include_str!("../../PROTOCOL.md").split("\n## Names\n").nth(1).unwrap();
    let list =
        names.lines().filter_map(|line| line.strip_prefix("    ")).flat_map(str::split_whitespace);
    let ranges: Vec<_> = list
        .take_while(|word| *word != "and")
        .map(|word| {
            let (first, last) = word.trim_end_matches(',').split_once('–').unwrap_or((word, word));
            [first, last].map(|hex| u32::from_str_radix(hex, 16).unwrap())
        })
        .collect();
    for character in '\u{80}'..=char::MAX {
        let code = u32::from(character);
        let is_listed = ranges.iter().any(|&[first, last]| (first..=last).contains(&code));
        let is_last_of_plane = [0xfffe, 0xffff].contains(&(code & 0xffff));
        let is_good = is_good_name(character.encode_utf8(&mut [0; 4]));
        assert_eq!(is_good, !is_listed && !is_last_of_plane, "{code:X}");
    }
}

// 2. Output

#[test]
fn an_outbox_holds_no_more_than_its_client_must_receive() {
    let (mut log, mut outbox) = (Log::default(), Outbox::default());
    outbox.start_at_end(&log);
    for (is_first, pending) in [(true, "PONG,"), (false, "PONG,line,PONG,own,")] {
        if !is_first {
            log.bytes.extend(b"line,");
        }
        outbox.push(b"PONG,".to_vec(), &log, true);
        log.bytes.extend(b"own,");
        outbox.skip("own,".len(), &log);
        assert_eq!(outbox.pending(&log), pending.len());
    }
    assert_eq!(outbox.consume("PONG,line,P".len()), "PONG,P".len());
    assert_eq!((outbox.pending(&log), outbox.cursor(&log)), ("ONG,".len(), None));
    outbox.consume("ONG,".len());
    assert_eq!(outbox.inserts.capacity(), 0, "memory is kept");
    for _ in 0..2 {
        outbox.stop_at_end(&log);
        log.bytes.extend(b"LEFT,");
    }
    assert_eq!(outbox.pending(&log), 0);
}

#[test]
fn a_flooder_with_one_unread_byte_needs_few_inserts() {
    let (mut log, mut outbox) = (Log::default(), Outbox::default());
    outbox.start_at_end(&log);
    log.bytes.extend(b"x");
    for _ in 0..1000 {
        log.bytes.extend(b"MSG flooder text\r\n");
        outbox.skip(18, &log);
    }
    assert_eq!(outbox.inserts.len(), 1);
    for _ in 0..Outbox::CHUNK {
        outbox.push(b"PONG\r\n".to_vec(), &log, true);
    }
    assert_eq!(outbox.next_chunk(&log, &mut Vec::new()).len(), Outbox::CHUNK);
    assert_eq!((outbox.inserts.len(), outbox.consume(1)), (2, 0));
    assert_eq!(outbox.next_chunk(&log, &mut Vec::new()).len(), 6 * Outbox::CHUNK);
}

// 4. Flow control

#[test]
fn the_bucket_fills_at_64_kib_a_second_and_holds_a_second_of_it() {
    let (start, half) = (os::now(), BUDGET as u64 / 2);
    let at = |milliseconds| start + Duration::from_millis(milliseconds);
    let mut budget = Budget::default();
    budget.over_soft_limit.insert(99);
    budget.update(0, start);
    // The clients whose requests go on, in order.
    let batch = |budget: &mut Budget, milliseconds| -> Vec<Id> {
        std::iter::from_fn(|| budget.next(at(milliseconds))).collect()
    };
    budget.queue.push(1, 2 * half);
    assert_eq!(batch(&mut budget, 0), [1]);
    budget.queue.push(1, half);
    assert_eq!(batch(&mut budget, 499), []);
    // Batches are 20 ms apart.
    assert_eq!(budget.next_time(at(499)), Some(at(519)));
    assert_eq!(batch(&mut budget, 518), []);
    assert_eq!(batch(&mut budget, 519), [1]);
    // The bucket was filled during these 19 ms too.
    budget.queue.push(1, half + half / 50);
    assert_eq!(batch(&mut budget, 1000), []);
    assert_eq!(batch(&mut budget, 1020), [1]);
    // Ten seconds later the bucket holds one second of its rate, not ten.
    (1..=3).for_each(|id| budget.queue.push(id, half));
    assert_eq!(batch(&mut budget, 11_020), [1, 2]);
    assert_eq!(batch(&mut budget, 11_519), []);
    assert_eq!(batch(&mut budget, 11_539), [3]);
    // All requests that wait go on unpaid when the budget ceases.
    (1..=3).for_each(|id| budget.queue.push(id, 4 * half - id as u64));
    assert_eq!(batch(&mut budget, 11_540), []);
    budget.over_soft_limit.clear();
    budget.update(0, at(11_540));
    let paid_until = budget.paid_until;
    assert_eq!(budget.next_time(at(11_540)), Some(at(11_540)));
    assert_eq!(batch(&mut budget, 11_540), [3, 2, 1]);
    assert_eq!((budget.next_time(at(11_540)), budget.paid_until), (None, paid_until));
}

/// Serves the next client of a queue at this cost.
fn serve(queue: &mut FairQueue, cost: u64) -> Id {
    let id = queue.pop().unwrap();
    queue.charge(id, cost);
    id
}

#[test]
fn the_smallest_finish_goes_next_as_in_the_example_of_the_document() {
    let (ana, bob, cleo) = (1, 2, 3);
    let mut queue = FairQueue::default();
    let position = |queue: &FairQueue| queue.virtual_time / FairQueue::SCALE;
    queue.push(ana, 1000);
    queue.push(bob, 600);
    // A client that waits already keeps its place.
    queue.push(bob, 600);
    assert_eq!(queue.waiting.len(), 2);
    assert_eq!((serve(&mut queue, 600), position(&queue)), (bob, 300));
    queue.push(bob, 600);
    assert_eq!((serve(&mut queue, 1000), position(&queue)), (ana, 800));
    // A new client starts level with those that wait.
    queue.push(cleo, 100);
    let finishes = [bob, cleo].map(|id| queue.finishes[&id] / FairQueue::SCALE);
    assert_eq!(finishes, [1200, 900]);
    assert_eq!([serve(&mut queue, 100), serve(&mut queue, 600)], [cleo, bob]);
    assert_eq!((queue.is_empty(), position(&queue), queue.finishes.len()), (true, 0, 0));
    // All clients start level again when none waits, even if the last one was removed.
    queue.push(ana, 0);
    queue.push(bob, 7);
    assert_eq!(serve(&mut queue, 1000), ana);
    queue.remove(bob);
    assert_eq!((queue.is_empty(), position(&queue), queue.finishes.len()), (true, 0, 0));
}

// 6. The console

#[test]
fn the_console_is_printed_and_one_that_is_not_read_or_full_stops_nothing() {
    let print = |out: &mut dyn Write| {
        let (mut console, texts) = Console::new();
        let pending = console.pending.clone();
        console.log(format_args!("first"));
        console.flush();
        let space = Console::MAX_PENDING - pending.load(Ordering::Relaxed);
        pending.fetch_add(space, Ordering::Relaxed);
        (0..1000).for_each(|_| console.log(format_args!("not printed")));
        pending.fetch_sub(1, Ordering::Relaxed);
        ["after", "that"].iter().for_each(|word| console.log(format_args!("{word}")));
        pending.fetch_sub(space - 1, Ordering::Relaxed);
        console.flush();
        drop(console);
        print_texts(texts, &pending, out);
        assert_eq!(pending.load(Ordering::Relaxed), 0);
    };
    // A full disk.
    print(&mut [0; 0].as_mut_slice());
    let mut printed = Vec::new();
    print(&mut printed);
    let text = String::from_utf8(printed).unwrap();
    let lines: Vec<_> = text.lines().map(|line| line.split_once(' ').unwrap().1).collect();
    let dropped = "1000 lines dropped: the console was not read";
    assert_eq!(lines, ["first", dropped, "after", "that"]);
}

#[test]
fn times_are_written_as_rfc_3339_says() {
    for (seconds, text) in [
        (0, "1970-01-01T00:00:00Z"),
        (951_782_400, "2000-02-29T00:00:00Z"),
        (1_693_526_399, "2023-08-31T23:59:59Z"),
        (1_735_689_599, "2024-12-31T23:59:59Z"),
        (4_107_542_400, "2100-03-01T00:00:00Z"),
    ] {
        assert_eq!(utc(UNIX_EPOCH + Duration::from_secs(seconds)), text);
    }
}

// 7. The command line

#[test]
fn the_command_line_is_parsed_or_the_mistake_is_named() {
    let unlimited = usize::MAX;
    let default = &*format!(
        "host: None, port: 9999 }}, max_clients: {unlimited}, max_per_ip: None, name_timeout: 60s, verbose: false"
    );
    for (line, parsed) in [
        ("", default),
        (
            "--max-clients 5 --max-per-ip=0 --name-timeout 7 --verbose [::1]:80",
            r#""::1"), port: 80 }, max_clients: 5, max_per_ip: Some(0), name_timeout: 7s, verbose: true"#,
        ),
        ("9991", "host: None, port: 9991"),
        (":9991", "host: None, port: 9991"),
        ("::ffff:1.2.3.4", r#"host: Some("::ffff:1.2.3.4"), port: 9999"#),
        ("[::1]", r#"host: Some("::1"), port: 9999"#),
        ("localhost", r#"host: Some("localhost"), port: 9999"#),
        ("localhost:0", r#"host: Some("localhost"), port: 0"#),
        ("--help -x", "Ok(Show(\"Usage: "),
        ("-h", "SIGHUP"),
        ("-V", "Ok(Show(\"linechat-server "),
        ("--max-clients", "Err(\"--max-clients needs a number"),
        ("--max-clients x", "--max-clients takes a whole number from 1 to 4294967295, not 'x'"),
        ("--max-clients 0", "not '0'"),
        ("--max-per-ip=-1", "not '-1'"),
        ("--name-timeout=", "not ''"),
        ("--verbose=yes", "Err(\"there is no option --verbose=yes"),
        ("-x:1 --help", "Err(\"there is no option -x:1"),
        ("a:1 b:2", "Err(\"'b:2' is a second address"),
        ("a=b:x", "Err(\"'a=b:x' is not an address to listen on"),
    ] {
        let result = parse_arguments(line.split_whitespace().map(str::to_owned));
        assert!(format!("{result:?}").contains(parsed), "{line}: {result:?}");
    }
    let bad = "|:|65536|localhost:|localhost:http|a:1:2|[::1|::1]|[::1]x|[::1]:|[localhost]:1|[]|a b|[1.2.3.4]:1|a/b:1";
    bad.split('|').for_each(|text| drop(parse_address(text).expect_err(text)));
}

#[test]
fn without_a_host_the_server_listens_on_ipv6_only_where_that_serves_ipv4_too() {
    let addresses = |bindv6only| format!("{:?}", any_addresses(9, Some(bindv6only)));
    assert_eq!(addresses("0\n"), "[[::]:9, 0.0.0.0:9]");
    assert_eq!(addresses("1\n"), "[0.0.0.0:9]");
}

#[test]
fn an_error_tells_why_the_server_cannot_listen() {
    for (host, kind, words) in [
        (Some("::1"), ErrorKind::PermissionDenied, ["::1 port 80", "below 1024"]),
        (None, ErrorKind::AddrInUse, ["on port 80", "another port"]),
    ] {
        let text = explain(&Address { host: host.map(str::to_owned), port: 80 }, kind.into());
        assert!(words.iter().all(|word| text.contains(word)), "{text}");
    }
}

// The document

#[test]
fn the_document_has_the_same_limits_and_the_sections_that_comments_name() {
    let document = include_str!("../../PROTOCOL.md");
    let (kib, mib) = (|bytes: usize| bytes >> 10, |bytes: usize| bytes >> 20);
    for row in [
        format!("| request | {MAX_REQUEST} bytes "),
        format!("| server line | {MAX_LINE} bytes "),
        format!("| name | {MAX_NAME} bytes |"),
        format!("| pushed roster | {MAX_PUSHED_ROSTER} people |"),
        format!("| name time-out | {} s,", NAME_TIMEOUT.as_secs()),
        format!("until the client closes; close within {} s overall", CLOSE_TIMEOUT.as_secs()),
        format!("| waiting replies | {} KiB |", kib(REPLY_LIMIT)),
        format!("| soft limit | {} KiB |", kib(SOFT_LIMIT)),
        format!("| own lines | {} MiB |", mib(OWN_BYTES_LIMIT)),
        format!("| budget | {0} KiB/s, saved up to {0} KiB |", kib(BUDGET)),
        format!("| hard limit | {} MiB |", mib(HARD_LIMIT)),
        format!("| stall | {} s |", STALL_TIMEOUT.as_secs()),
        format!("| closing | {} s |", CLOSE_TIMEOUT.as_secs()),
        format!("| stopping | {} s |", STOP_TIMEOUT.as_secs()),
    ] {
        assert!(document.contains(&row), "{row}");
    }
    // A comment may go on in the next line.
    let programs = [include_str!("../../server.rs"), include_str!("../../client.rs")].concat();
    let comments = programs.lines().map(|line| line.trim_start_matches([' ', '/']));
    let comments = comments.collect::<Vec<_>>().join(" ");
    let named = comments.split("(PROTOCOL.md, ").skip(1).filter_map(|it| it.split(')').next());
    let sections: Vec<_> = named.flat_map(|it| it.split('"').skip(1).step_by(2)).collect();
    let has = |section: &str| document.contains(&format!("\n## {section}\n"));
    sections.iter().for_each(|section| assert!(has(section), "{section}"));
    assert!(sections.len() > 15, "{sections:?}");
}

// 8. The operating system

fn socket_pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (near, listener.accept().unwrap().0)
}

const NEITHER: Interest = Interest { read: false, write: false };

/// A test that waits this long for a peer or the kernel is stuck.
const STUCK: Duration = Duration::from_secs(10);

/// The poller reports this next. A child of another test may keep copies of this process's
/// descriptors until it runs its program, and so delay the end of a stream.
fn assert_reports(poller: &mut system::Poller, token: usize, conditions: &str) {
    let [readable, writable, failed] =
        ["readable", "writable", "failed"].map(|word| conditions.contains(word));
    let expected = [Readiness { token, readable, writable, failed }];
    assert_eq!(poller.wait(Some(STUCK)).unwrap(), expected);
}

/// The poller waits for as long as it is asked to, and reports nothing.
fn assert_waits(poller: &mut system::Poller) {
    let (begun, moment) = (Instant::now(), Duration::from_millis(20));
    assert_eq!(poller.wait(Some(moment)).unwrap(), []);
    assert!(begun.elapsed() >= moment, "it did not wait");
}

#[test]
fn the_poller_reports_readiness_for_as_long_as_it_lasts() {
    let mut poller = system::Poller::new().unwrap();
    let (mut near, mut far) = socket_pair();
    poller.watch(&near, 7, Watch::Begin(READ)).unwrap();
    assert_waits(&mut poller);
    let mut sender = far.try_clone().unwrap();
    std::thread::spawn(move || {
        // Another poller lets some time pass.
        assert_waits(&mut system::Poller::new().unwrap());
        sender.write_all(b"x").unwrap();
    });
    assert_eq!(poller.wait(None).unwrap().len(), 1);
    assert_reports(&mut poller, 7, "readable");
    assert_reports(&mut poller, 7, "readable");
    poller.watch(&near, 7, Watch::Change(Interest { read: true, write: true })).unwrap();
    assert_reports(&mut poller, 7, "readable, writable");
    near.read_exact(&mut [0]).unwrap();
    assert_reports(&mut poller, 7, "writable");
    poller.watch(&near, 7, Watch::Change(NEITHER)).unwrap();
    far.write_all(b"x").unwrap();
    assert_waits(&mut poller);
    poller.watch(&near, 7, Watch::End).unwrap();
    drop(far);
    assert_waits(&mut poller);
}

#[test]
#[cfg(target_os = "linux")]
fn the_poller_reports_failures_that_were_not_asked_for() {
    let mut poller = system::Poller::new().unwrap();
    let (mut near, far) = socket_pair();
    poller.watch(&near, 7, Watch::Begin(NEITHER)).unwrap();
    // A peer that closes with something unread resets the connection.
    near.write_all(b"x").unwrap();
    drop(far);
    assert_reports(&mut poller, 7, "readable, writable, failed");
    poller.watch(&near, 7, Watch::End).unwrap();
    // The end of one side is not a failure; the end of both is, to epoll(7).
    let (near, far) = socket_pair();
    poller.watch(&near, 8, Watch::Begin(READ)).unwrap();
    far.shutdown(Shutdown::Write).unwrap();
    assert_reports(&mut poller, 8, "readable");
    near.shutdown(Shutdown::Write).unwrap();
    let is_epoll = cfg!(not(linechat_poll));
    let end_of_both = if is_epoll { "readable, writable, failed" } else { "readable" };
    assert_reports(&mut poller, 8, end_of_both);
    poller.watch(&near, 8, Watch::End).unwrap();
    // A failure without a hang-up: a pipe without a reader.
    let mut child = Process::new("true").stdin(Stdio::piped()).spawn().unwrap();
    let pipe = child.stdin.take().unwrap();
    child.wait().unwrap();
    poller.watch(&pipe, 9, Watch::Begin(NEITHER)).unwrap();
    assert_reports(&mut poller, 9, "readable, writable, failed");
}

#[test]
#[cfg(linechat_poll)]
fn a_hang_up_rests_unless_reading_was_asked_for() {
    // A pipe without a writer hangs up, and is not readable (poll(2)).
    let mut child = Process::new("true").stdout(Stdio::piped()).spawn().unwrap();
    let pipe = child.stdout.take().unwrap();
    child.wait().unwrap();
    let mut poller = system::Poller::new().unwrap();
    poller.watch(&pipe, 7, Watch::Begin(READ)).unwrap();
    assert_reports(&mut poller, 7, "readable");
    poller.watch(&pipe, 7, Watch::Change(NEITHER)).unwrap();
    assert_eq!(poller.wait(None).unwrap(), []);
    // The system would report it again at once.
    assert_waits(&mut poller);
    poller.watch(&pipe, 7, Watch::Change(READ)).unwrap();
    assert_reports(&mut poller, 7, "readable");
}

#[test]
fn an_interruption_is_not_a_failure_of_the_poller() {
    let waited = |kind: ErrorKind| system::ready_count(Err(kind.into())).ok();
    assert_eq!(waited(ErrorKind::Interrupted), Some(0));
    assert_eq!(waited(ErrorKind::InvalidInput), None);
}

#[test]
#[cfg(target_os = "linux")]
fn the_kernel_keeps_at_most_256_kib_for_a_slow_peer() {
    let (mut near, far) = socket_pair();
    system::set_socket_options(&near);
    near.set_nonblocking(true).unwrap();
    let mut taken = 0;
    while let Ok(length) = near.write(&[0; 16 * 1024]) {
        taken += length;
    }
    let received = far.peek(&mut vec![0; taken]).unwrap();
    let kept = (taken - received) / 1024;
    assert!((128..=256).contains(&kept), "the kernel keeps {kept} KiB");
}

#[test]
#[cfg(target_os = "linux")]
fn hundreds_of_connections_can_wait_to_be_accepted() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    system::set_accept_queue(&listener);
    let most = std::fs::read_to_string("/proc/sys/net/core/somaxconn").unwrap();
    let most: usize = most.trim().parse().unwrap();
    // A connection that finds the queue full is tried again for minutes.
    let address = listener.local_addr().unwrap();
    for _ in 0..most.min(200) {
        TcpStream::connect_timeout(&address, STUCK).expect("space in the queue");
    }
}
