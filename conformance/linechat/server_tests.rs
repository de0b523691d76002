//! Tests of server.rs, part by part: what neither a transcript nor the simulation shows, and the calls
//! of the real operating system. They are in the server's own module, so that they see all of it.

use super::*;
use os::{Buffers, Conditions, Peer};
use std::net::{TcpListener, TcpStream};
#[cfg(target_os = "linux")]
use std::process::{Command as Process, Stdio};

// 1. The wire

/// All that a decoder finds in a stream, as text. It must be the same wherever the stream is cut.
fn decode(stream: &[u8]) -> Vec<String> {
    let decode_pieces = |pieces: [&[u8]; 2]| {
        let (mut decoder, mut found) = (Decoder::default(), Vec::new());
        for mut piece in pieces {
            while let Some(decoded) = decoder.next(&mut piece) {
                found.push(match decoded {
                    Decoded::Line(line) => line.escape_ascii().to_string(),
                    Decoded::TooLong => "too long".to_owned(),
                    Decoded::TelnetAnswer(answer) => format!("{answer:?}"),
                });
            }
            assert!(piece.is_empty());
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
        (b"\x08yz", vec!["too long"]),
        // In the skipped rest telnet is answered, erasing does nothing, and CR NUL ends it.
        (b"xx\xff\xfd\x06\0\r\x08\x08\0next\n", vec!["too long", "[255, 252, 6]", "next"]),
        (b"\x08\ryz\x08\x08\0\nnext\n", vec!["too long", "next"]),
    ] {
        assert_eq!(decode(&[full.as_bytes(), end].concat()), found, "{}", end.escape_ascii());
    }
}

#[test]
fn a_decoder_keeps_no_memory_between_lines() {
    let mut decoder = Decoder::default();
    let mut capacity_after = |mut input: &[u8]| {
        while decoder.next(&mut input).is_some() {}
        decoder.line.capacity()
    };
    assert_eq!(capacity_after(b"MSG a\nMSG b\r\n"), 0);
    assert!(capacity_after(b"MSG ") > 0);
    assert_eq!(capacity_after(b"c\n"), 0);
    // The rest of a long line is held nowhere.
    (0..1000).for_each(|_| assert!(capacity_after(&[b'x'; MAX_REQUEST]) < 4 * MAX_REQUEST));
}

#[test]
fn the_first_check_that_fails_gives_the_error() {
    for (is_named, expected, lines) in [
        (false, "bad-text", "NAME \u{7f}|nonsense \u{202e}"),
        (true, "unknown-command", "MſG hi|msg\thi| MSG hi| |MSGS"),
        (true, "already-named", "NAME ana|NAME|name |NAME a b"),
        (false, "not-named", "MSG hi|MSG|PRIV @bob hi|PRIV bob hi|LIST|list x"),
        (false, "usage", "NAME|name |HELP x|QUIT \t"),
        (true, "usage", "MSG|MSG |PRIV @bob |PRIV @bob|PRIV @ hi|PRIV bob hi|PRIV  @bob hi|LIST x"),
        (false, "", "NAME ana|name a b|PiNg|PING  a b|help  |QUIT"),
        (true, "", "MSG  |PRIV @bob  |LIST  |PING|HELP|quit "),
    ] {
        for line in lines.split('|') {
            let code = parse(line.as_bytes(), is_named).err().map_or("", |Refusal(code, _)| code);
            assert_eq!(code, expected, "{line:?}");
        }
    }
    assert_eq!(parse(b"MSG \xff", false), Err(BAD_TEXT));
    let text = "  é\t🙂 ";
    assert_eq!(parse("MSG   é\t🙂 ".as_bytes(), true), Ok(Request::Msg(text)));
    let to = "bob";
    assert_eq!(parse("PRIV @bob   é\t🙂 ".as_bytes(), true), Ok(Request::Priv { to, text }));
    assert_eq!(parse("PING   é\t🙂 ".as_bytes(), true), Ok(Request::Ping(text)));
}

#[test]
fn texts_hold_no_control_character_and_none_that_turns_the_direction() {
    for character in '\0'..=char::MAX {
        // As PROTOCOL.md lists them under "Text".
        let is_listed = match u32::from(character) {
            0x09 => false,
            0..=0x1f | 0x7f..=0x9f | 0x2028..=0x202e | 0x2066..=0x2069 => true,
            _ => false,
        };
        assert_eq!(is_forbidden_in_text(character), is_listed, "{}", character.escape_unicode());
    }
}

#[test]
fn names_hold_what_the_document_allows() {
    let ascii = |form: fn(char) -> String| -> String {
        ('\0'..='\x7f').filter(|&c| is_good_name(&form(c))).collect()
    };
    let first = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";
    let further = "-.0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ_abcdefghijklmnopqrstuvwxyz";
    assert_eq!((&*ascii(|c| format!("{c}é")), &*ascii(|c| format!("é{c}"))), (first, further));
    assert!(is_good_name(&"é".repeat(25)) && !is_good_name(&"é".repeat(26)) && !is_good_name(""));
    // The list of the document: hexadecimal numbers and ranges up to "and".
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

#[test]
fn a_roster_line_is_filled_to_its_last_byte() {
    // "USERS 9", a space before each name, and CR LF.
    let long = "x".repeat(MAX_LINE - "USERS 9 \r\n".len() - " y".len());
    for (names, roster) in [
        (vec![&*long, "y"], format!("USERS 9 {long} y\r\n")),
        (vec![&long, "yy", "z"], format!("USERS 9 {long}\r\nUSERS 9 yy z\r\n")),
        (vec!["y", &long], format!("USERS 9 y {long}\r\n")),
    ] {
        let mut bytes = b"before\r\n".to_vec();
        put_roster(&mut bytes, 9, names.into_iter());
        assert_eq!(String::from_utf8_lossy(&bytes), format!("before\r\n{roster}"));
    }
}

// 2. Output

#[test]
fn a_log_is_trimmed_when_most_of_it_is_dead_and_keeps_little_memory() {
    let (mut log, half) = (Log::default(), 5 * Log::KEPT_CAPACITY);
    log.bytes.extend((0..2 * half).map(|at| (at % 251) as u8));
    let (last, end) = (log.bytes[2 * half - 1], log.end());
    for (position, start) in [(half, 0), (half + 1, half + 1), (2 * half - 1, 2 * half - 1)] {
        log.trim(position as u64);
        assert_eq!((log.start, log.end()), (start as u64, end));
        assert_eq!(log.slice(end - 1, end), [last]);
    }
    log.trim(end);
    assert_eq!((log.end(), log.slice(end, 0)), (end, b"".as_slice()));
    assert!(log.bytes.capacity() <= Log::KEPT_CAPACITY);
}

#[test]
fn an_outbox_gives_out_each_byte_once_and_in_order() {
    // How many bytes the socket takes after each line.
    for size in 0..10 {
        let (mut log, mut outbox) = (Log::default(), Outbox::default());
        let (mut sent, mut own) = (Vec::new(), 0);
        let mut write = |outbox: &mut Outbox, log: &Log, size| {
            let mut scratch = Vec::new();
            let chunk = outbox.next_chunk(log, &mut scratch);
            assert_eq!(chunk.is_empty(), outbox.pending(log) == 0);
            // All that is pending is in one chunk; only own lines may come in two.
            let skipped = outbox.inserts.iter().map(|insert| insert.skip as usize).sum::<usize>();
            let is_whole = chunk.len() + skipped == outbox.pending(log);
            assert!(is_whole || outbox.cursor(log).is_none());
            let taken = chunk.len().min(size);
            sent.extend(&chunk[..taken]);
            own += outbox.consume(taken);
        };
        outbox.push(b"HELLO ", &log, true);
        log.bytes.extend(b"1 ");
        outbox.start_at_end(&log);
        for line in "WELCOME,own,2,PONG,own,own,PRIV,PONG,3,4,own,PRIV".split_inclusive(',') {
            match line.starts_with('P') || line.starts_with('W') {
                true => outbox.push(line.as_bytes(), &log, !line.starts_with("PRIV")),
                false => log.bytes.extend(line.as_bytes()),
            }
            if line == "own," {
                outbox.skip(line.len(), &log);
            }
            write(&mut outbox, &log, size);
        }
        if size == 0 {
            let until_reply = "HELLO WELCOME,PONG,PRIV,PONG,".len();
            assert_eq!((outbox.cursor(&log), outbox.until_reply), (Some(6), until_reply));
            assert_eq!(outbox.pending(&log), until_reply + "PRIV2,own,own,3,4,own,".len());
        }
        outbox.stop_at_end(&log);
        log.bytes.extend(b"LEFT,");
        outbox.skip("LEFT,".len(), &log);
        outbox.stop_at_end(&log);
        outbox.push(b" BYE", &log, true);
        while outbox.pending(&log) > 0 {
            write(&mut outbox, &log, size.max(1));
        }
        assert_eq!((outbox.cursor(&log), outbox.until_reply), (None, 0));
        assert_eq!(outbox.inserts.capacity(), 0, "memory is kept");
        assert_eq!(own, "HELLO WELCOME,PONG,PRIV,PONG,PRIV BYE".len());
        let text = String::from_utf8(sent).unwrap();
        assert_eq!(text, "HELLO WELCOME,2,PONG,PRIV,PONG,3,4,PRIV BYE", "in pieces of {size}");
    }
}

#[test]
fn own_messages_are_pending_only_behind_a_line_of_another_client() {
    let (mut log, mut outbox) = (Log::default(), Outbox::default());
    outbox.start_at_end(&log);
    for (is_first, pending) in [(true, "PONG,"), (false, "PONG,line,PONG,own,")] {
        if !is_first {
            log.bytes.extend(b"line,");
        }
        outbox.push(b"PONG,", &log, true);
        log.bytes.extend(b"own,");
        outbox.skip("own,".len(), &log);
        assert_eq!(outbox.pending(&log), pending.len());
    }
    assert_eq!(outbox.consume("PONG,line,P".len()), "PONG,P".len());
    assert_eq!((outbox.pending(&log), outbox.cursor(&log)), ("ONG,".len(), None));
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
        outbox.push(b"PONG\r\n", &log, true);
    }
    assert_eq!(outbox.next_chunk(&log, &mut Vec::new()).len(), Outbox::CHUNK);
    assert_eq!((outbox.inserts.len(), outbox.consume(1)), (2, 0));
    assert_eq!(outbox.next_chunk(&log, &mut Vec::new()).len(), 6 * Outbox::CHUNK);
}

// 3. The room

fn room_with(names: &[&str]) -> Room {
    let (listener, _signals) = os::begin(1, Conditions::default());
    let mut room = Room::default();
    for (id, name) in names.iter().enumerate() {
        Peer::connect(([192, 0, 2, 7], id as u16).into(), Buffers::UNLIMITED);
        let (socket, address) = listener.accept().unwrap();
        room.clients.insert(Client::new(socket, address));
        room.join(id, name);
    }
    room
}

#[test]
fn a_request_costs_the_line_that_others_receive() {
    let mut room = room_with(&["ana", "Bób"]);
    for (request, cost) in [
        (Request::Msg("hi"), "MSG ana hi\r\n".len()),
        (Request::Priv { to: "bÓb", text: "hi" }, "PRIV ana hi\r\n".len()),
        (Request::Priv { to: "ANA", text: "hi" }, 0),
        (Request::Priv { to: "eve", text: "hi" }, 0),
        (Request::List, 0),
        (Request::Ping("hi"), 0),
        (Request::Quit, 0),
    ] {
        assert_eq!(room.cost(0, request), cost);
        let before = room.clients.get(1).unwrap().outbox.pending(&room.log);
        let _ = room.carry_out(0, request);
        let after = room.clients.get(1).unwrap().outbox.pending(&room.log);
        assert_eq!(after - before, cost, "{request:?}");
    }
    // JOINED and LEFT in a room of up to 999,999.
    let cost = "JOINED bo 999999\r\nLEFT bo 999999 disconnected\r\n".len();
    assert_eq!(room.cost(2, Request::Name("bo")), cost);
    assert_eq!([room.cost(2, Request::Name("b b")), room.cost(2, Request::Name("BÓB"))], [0, 0]);
}

#[test]
fn requests_wait_from_the_first_byte_of_replies_above_the_limit() {
    let Room { mut clients, log, .. } = room_with(&["ana"]);
    let client = clients.get_mut(0).unwrap();
    client.outbox = Outbox::default();
    // Private messages after the last reply do not count.
    for (length, is_reply, takes) in
        [(REPLY_LIMIT, true, true), (REPLY_LIMIT, false, true), (1, true, false)]
    {
        client.outbox.push(&vec![b'x'; length], &log, is_reply);
        assert_eq!(client.takes_requests(), takes, "{length} bytes");
    }
    client.outbox.consume(REPLY_LIMIT + 1);
    assert!(client.takes_requests());
}

// 4. Flow control

/// A budget that applies, with an empty bucket. Each of these clients waits with a request of this cost.
fn budget_with(now: Instant, waiting: &[(Id, u64)]) -> Budget {
    let mut budget = Budget::default();
    budget.over_soft_limit.insert(99);
    budget.update(0, now);
    budget.queue.push(98, BUDGET as u64);
    assert_eq!(budget.next(now), Some(98));
    waiting.iter().for_each(|&(id, cost)| budget.queue.push(id, cost));
    budget
}

/// The clients whose requests go on at `now`, in order.
fn batch(budget: &mut Budget, now: Instant) -> Vec<Id> {
    std::iter::from_fn(|| budget.next(now)).collect()
}

#[test]
fn the_budget_applies_while_a_client_is_behind_or_own_lines_fill_64_mib() {
    let now = os::now();
    let mut budget = Budget::default();
    for (own_bytes, behind, applies) in [
        (0, None, false),
        (0, Some(7), true),
        (OWN_BYTES_LIMIT, None, false),
        (OWN_BYTES_LIMIT + 1, None, true),
    ] {
        budget.over_soft_limit = BTreeSet::from_iter(behind);
        budget.update(own_bytes, now);
        assert_eq!(budget.applies(), applies, "{own_bytes} {behind:?}");
    }
    budget.update(OWN_BYTES_LIMIT + 1, now + Duration::from_secs(5));
    assert_eq!(budget.applies_since, Some(now));
}

#[test]
fn all_waiting_requests_go_on_unpaid_when_the_budget_ceases() {
    let now = os::now();
    let mut budget = budget_with(now, &[(1, 1000), (2, 10 * BUDGET as u64), (3, 1)]);
    assert_eq!(batch(&mut budget, now), []);
    budget.over_soft_limit.clear();
    budget.update(0, now);
    assert_eq!(budget.next_time(now), Some(now));
    let paid_until = budget.paid_until;
    assert_eq!(batch(&mut budget, now), [3, 1, 2]);
    assert_eq!((budget.next_time(now), budget.paid_until), (None, paid_until));
}

#[test]
fn the_bucket_fills_at_64_kib_a_second_and_holds_a_second_of_it() {
    let start = os::now();
    let half = BUDGET as u64 / 2;
    let mut budget = budget_with(start, &[(1, half)]);
    let at = |milliseconds| start + Duration::from_millis(milliseconds);
    assert_eq!(batch(&mut budget, at(499)), []);
    // Batches are 20 ms apart.
    assert_eq!(budget.next_time(at(499)), Some(at(519)));
    assert_eq!(batch(&mut budget, at(518)), []);
    assert_eq!(batch(&mut budget, at(519)), [1]);
    // The bucket was filled during these 19 ms too.
    budget.queue.push(1, half + half / 50);
    assert_eq!(batch(&mut budget, at(1000)), []);
    assert_eq!(batch(&mut budget, at(1020)), [1]);
    // Ten seconds later the bucket holds one second of its rate, not ten.
    (1..=3).for_each(|id| budget.queue.push(id, half));
    assert_eq!(batch(&mut budget, at(11_020)), [1, 2]);
    assert_eq!(batch(&mut budget, at(11_519)), []);
    assert_eq!(batch(&mut budget, at(11_539)), [3]);
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
fn a_console_that_is_not_read_drops_lines_and_tells_how_many() {
    let (mut console, texts) = Console::new();
    console.pending.store(Console::MAX_PENDING, Ordering::Relaxed);
    (0..1000).for_each(|_| console.log(format_args!("not printed")));
    console.flush();
    assert_eq!(texts.try_iter().count(), 0);
    console.pending.store(Console::MAX_PENDING - 1, Ordering::Relaxed);
    console.log(format_args!("after"));
    console.log(format_args!("that"));
    let lines: Vec<_> = console.text.lines().map(|line| line.split_once(' ').unwrap().1).collect();
    assert_eq!(lines, ["1000 lines dropped: the console was not read", "after", "that"]);
}

#[test]
fn the_console_is_printed_and_a_full_disk_stops_nothing() {
    let print = |out: &mut dyn Write| {
        let (mut console, texts) = Console::new();
        let pending = console.pending.clone();
        for word in ["first", "second"] {
            console.log(format_args!("{word}"));
            console.flush();
        }
        drop(console);
        print_texts(texts, &pending, out);
        assert_eq!(pending.load(Ordering::Relaxed), 0);
    };
    print(&mut [0; 0].as_mut_slice());
    let mut printed = Vec::new();
    print(&mut printed);
    let text = String::from_utf8(printed).unwrap();
    let lines: Vec<_> = text.lines().map(|line| line.split_once(' ').unwrap().1).collect();
    assert_eq!(lines, ["first", "second"]);
}

#[test]
fn times_are_written_as_rfc_3339_says() {
    for (seconds, text) in [
        (0, "1970-01-01T00:00:00Z"),
        (951_782_399, "2000-02-28T23:59:59Z"),
        (951_782_400, "2000-02-29T00:00:00Z"),
        (1_693_526_399, "2023-08-31T23:59:59Z"),
        (1_709_251_199, "2024-02-29T23:59:59Z"),
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
        ("127.0.0.1:0", r#"host: Some("127.0.0.1"), port: 0"#),
        ("::ffff:1.2.3.4", r#"host: Some("::ffff:1.2.3.4"), port: 9999"#),
        ("[::1]", r#"host: Some("::1"), port: 9999"#),
        ("localhost", r#"host: Some("localhost"), port: 9999"#),
        ("localhost:9991", r#"host: Some("localhost"), port: 9991"#),
        ("--help -x", "Ok(Show(\"Usage: "),
        ("-h", "SIGHUP"),
        ("-V", "Ok(Show(\"linechat-server "),
        ("--max-clients", "Err(\"--max-clients needs a number"),
        (
            "--max-clients x",
            "Err(\"--max-clients takes a whole number from 1 to 4294967295, not 'x'",
        ),
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
        format!("until the client closes, for at most {} s;", CLOSE_TIMEOUT.as_secs()),
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
    let mut sections = 0;
    for named in comments.split("(PROTOCOL.md, ").skip(1) {
        let named = named.split(')').next().unwrap_or_default();
        for section in named.split('"').skip(1).step_by(2) {
            assert!(document.contains(&format!("\n## {section}\n")), "{section}");
            sections += 1;
        }
    }
    assert!(sections > 15, "{sections}");
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

fn wait(poller: &mut system::Poller, timeout: Option<Duration>) -> Vec<Readiness> {
    poller.wait(timeout).unwrap()
}

/// The poller reports this next. A child of another test may keep copies of this process's
/// descriptors until it runs its program, and so delay the end of a stream.
fn assert_reports(poller: &mut system::Poller, token: usize, conditions: &str) {
    let [readable, writable, failed] =
        ["readable", "writable", "failed"].map(|word| conditions.contains(word));
    let expected = [Readiness { token, readable, writable, failed }];
    assert_eq!(wait(poller, Some(STUCK)), expected);
}

/// The poller waits for as long as it is asked to, and reports nothing.
fn assert_waits(poller: &mut system::Poller) {
    let (begun, moment) = (Instant::now(), Duration::from_millis(20));
    assert_eq!(wait(poller, Some(moment)), []);
    assert!(begun.elapsed() >= moment, "it did not wait");
}

#[test]
fn the_poller_reports_readiness_for_as_long_as_it_lasts() {
    let mut poller = system::Poller::new().unwrap();
    let (mut near, mut far) = socket_pair();
    poller.watch(&near, 7, Watch::Begin(READ)).unwrap();
    assert_waits(&mut poller);
    far.write_all(b"x").unwrap();
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
    assert_eq!(wait(&mut poller, None), []);
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
fn without_a_time_out_the_poller_waits_for_readiness() {
    let mut poller = system::Poller::new().unwrap();
    let (near, mut far) = socket_pair();
    poller.watch(&near, 7, Watch::Begin(READ)).unwrap();
    std::thread::spawn(move || {
        // Another poller lets some time pass.
        assert_waits(&mut system::Poller::new().unwrap());
        far.write_all(b"x").unwrap();
    });
    assert_eq!(wait(&mut poller, None).len(), 1);
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
