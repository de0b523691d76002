//! Unit tests of linechat-client: typed lines, keys, the editor, the screen, the texts, time-outs,
//! and reconnecting. The transcripts show what a user sees.

use super::*;
use std::sync::mpsc::{channel, sync_channel};

/// A client without a network: the test is its server and its user.
struct Session {
    client: Client,
    /// The connections that the test has not looked at, each with the lines that the client sends.
    connections: Receiver<Receiver<String>>,
    out: Receiver<String>,
}

impl Session {
    fn connecting(name: Option<&str>, screen: Screen) -> Session {
        let (started, connections) = channel();
        let connect = move |_| {
            let (out, sent) = sync_channel(MAX_QUEUED);
            let _ = started.send(sent);
            out
        };
        let (host, name) = ("host".to_owned(), name.map(str::to_owned));
        let options = Options { host, port: 9999, name, bell: "\x07", ..Options::default() };
        let client = Client::new(options, screen, Box::new(connect));
        let out = connections.recv().unwrap();
        Session { client, connections, out }
    }

    /// A client that is in the room as ana, in which bob is too.
    fn in_room(screen: Screen) -> Session {
        let mut session = Session::connecting(Some("ana"), screen);
        session.server_says("HELLO linechat/1 hi\nWELCOME ana 2\nUSERS 2 ana bob");
        session.sent();
        session.shown();
        session
    }

    fn server_says(&mut self, lines: &str) {
        for line in lines.split('\n') {
            let line = Ok(line.to_owned());
            self.client.handle(Event::Server(self.client.connection, line));
            self.client.send_waiting();
        }
    }

    /// Keys, or without the line editor a line.
    fn user_types(&mut self, text: &str) {
        self.client.handle_input(text.as_bytes());
        self.client.send_waiting();
    }

    fn lose(&mut self) {
        let loss = Err((text::LOST, "gone".to_owned()));
        self.client.handle(Event::Server(self.client.connection, loss));
    }

    /// Lets time pass until the client has something to do.
    fn wait(&mut self) {
        self.client.handle_due(self.client.due);
    }

    /// The lines that were sent since this was last called, on the latest connection.
    fn sent(&mut self) -> Vec<String> {
        if let Some(out) = self.connections.try_iter().last() {
            self.out = out;
        }
        self.out.try_iter().collect()
    }

    /// The text that was shown since this was last called.
    fn shown(&mut self) -> String {
        mem::take(&mut self.client.screen.pending)
    }

    /// The line that is being typed, with `|` for the cursor.
    fn line(&self) -> String {
        let editor = &self.client.screen.editor;
        let (before, after) = editor.line.split_at(editor.cursor);
        format!("{before}|{after}")
    }

    /// True if the client has ended, but not because the user left.
    fn has_failed(&self) -> bool {
        matches!(self.client.end, Some(Err(_)))
    }
}

fn plain() -> Screen {
    Screen::default()
}

/// A terminal with this many columns.
fn terminal(columns: usize) -> Screen {
    Screen { has_editor: true, columns, ..Screen::default() }
}

#[test]
fn lines_are_text_private_messages_or_commands() {
    for (line, expected) in [
        (" hello ", "MSG  hello \n"),
        ("@list hi", "PRIV @list hi\n"),
        // A leading space does not make a private message public; a comma is not part of the name.
        (" @bob secret", "PRIV @bob secret\n"),
        ("@bob, hi", "PRIV @bob hi\n"),
        ("/LIST ", "LIST\n"),
        ("  \r/list", "LIST\n"),
        ("/quit now", "Error: /quit stands alone; to write to somebody of that name: @quit text"),
        ("/ajuda", "Type a line and press Enter"),
        ("/bob", "Error: there is no text after '/bob'; see /help"),
        ("/me", "Error: there is no text after '/me'; see /help"),
    ] {
        let mut session = Session::in_room(terminal(200));
        session.user_types(&format!("{line}\r"));
        let outcome = session.sent().concat() + &session.shown();
        assert!(outcome.starts_with(expected), "{line:?}: {outcome:?}");
        assert_eq!(session.line(), "|");
    }
}

#[test]
fn a_piped_line_is_said_as_it_is() {
    let mut session = Session::in_room(plain());
    session.client.options.is_piped = true;
    let (keyboard, typed) = sync_channel(8);
    read_input("  //x \n\n/quit\r\nlast".as_bytes(), false, keyboard, sync_channel(8).0);
    session.client.take_input(&typed);
    let sent = session.sent().concat();
    assert_eq!(sent, "MSG   //x \nPING 1\nMSG /quit\nPING 2\nMSG last\nPING 3\nQUIT\n");
}

#[test]
fn keys_are_recognised() {
    use Key::*;
    let a = || Character('a');
    let endless = [b"\x1b[".to_vec(), b"1".repeat(17)].concat();
    for (bytes, expected) in [
        (b"\x1b[1;5D\x1b[1;3C".as_slice(), vec![Move(Place::WordLeft), Move(Place::WordRight)]),
        (b"\x1b[200~b\x03\x1b[A\x1b[201~a", vec![Paste("b\x03\x1b[A".to_owned()), a()]),
        (b"\x1bqa", vec![Unknown, a()]),
        // F1 of the console; what Shift adds in rxvt; End of PuTTY as rxvt; Esc before another key.
        (b"\x1b[[Aa", vec![Unknown, a()]),
        (b"\x1b[7$a", vec![Unknown, a()]),
        (b"\x1b[Owa", vec![Move(Place::End), a()]),
        (b"\x1b\x1b[Da", vec![Move(Place::Left), a()]),
        (b"\x1bOca\x1bOd", vec![Move(Place::WordRight), a(), Move(Place::WordLeft)]),
        // Bytes that are not UTF-8 delay no key.
        (b"\xffa", vec![Unknown, a()]),
        (b"\xe1 a", vec![Character(' '), a()]),
        (&endless, vec![Unknown]),
        (&endless[1..], endless[1..].iter().map(|byte| Character(char::from(*byte))).collect()),
        (&endless[..endless.len() - 1], vec![]),
    ] {
        let mut pending = Vec::new();
        let keys = bytes.iter().filter_map(|byte| Key::push_byte(&mut pending, *byte));
        assert_eq!(keys.collect::<Vec<_>>(), expected, "{bytes:?}");
    }
}

#[test]
fn the_line_is_edited_as_in_a_shell_and_names_are_completed() {
    for (keys, expected) in [
        ("hello\x1b[D\x1b[C\x1b[C!", "hello!|"),
        ("\x7fhello\x01\x7f\x1b[3~", "|ello"),
        ("hello\x02\x04", "hell|"),
        ("hello world\x02\x15", "|d"),
        ("one\u{3000}two  \x17", "one\u{3000}|"),
        ("日本\x02\x02語", "語|日本"),
        // By words, of letters and digits with their accents.
        ("one, two.\x01\x1b[1;5C\x1b[1;5C\x1bf!", "one, two.!|"),
        ("one, e\u{301}t.\x1b[1;5D!", "one, !|e\u{301}t."),
        ("one, two.\x1b\x7f", "one, |"),
        // Ctrl-Y inserts the erased text at the cursor.
        ("one two\x01\x0b\x19\x19", "one twoone two|"),
        ("one\x03\x19", "one|"),
        // Erasing forwards twice; a key between two that erase.
        ("one two three\x01\x1bd\x1bd\x05\x19", " threeone two|"),
        ("one two\x17\x02\x17\x05\x19", " one|"),
        // Ctrl-_ undoes a typed word, or one key that erased.
        ("one two\x1f\x1f\x1f\x1f", "|"),
        ("one\x03\x1f", "one|"),
        ("ab\x1fc\x1f", "|"),
        // An accent goes with its letter.
        ("ae\u{301}\x7f", "a|"),
        ("ae\u{301}\x02\x02\x06", "a|e\u{301}"),
        ("a\x1b[200~\r \n\x1b[201~b", "ab|"),
        ("a\u{202e}\u{85}b", "ab|"),
        // Tab completes the names of others in turn: those with the same accents come first. On an
        // empty line it answers the last private message, if there is one.
        ("\t", "|"),
        ("@\t\t\t\t", "@bob |"),
        ("@x\t", "@x|"),
        ("b\x1b[Z", "bob: |"),
        ("å\t", "Åse: |"),
        ("a\t\t", "Åse: |"),
        ("hi @e\t, you", "hi @Érica, you|"),
        ("E\u{301}r\t", "Érica: |"),
        ("hi\x01@b\t", "@Bert |hi"),
        ("@b\t \t", "@Bert  Ada|"),
        ("@bob\x01\t", "Ada: |@bob"),
    ] {
        let mut session = Session::in_room(terminal(80));
        session.server_says("USERS 6 bob Bert Érica ana Ada Åse");
        session.user_types(keys);
        assert_eq!(session.line(), expected, "{keys:?}");
    }
    assert_eq!(plain_letters("ÀÁÂÃÄÅÇÈÉÊËÌÍÎÏ"), "aaaaaaceeeeiiii");
    assert_eq!(plain_letters("ÑÒÓÔÕÖÙÚÛÜC\u{327}"), "nooooouuuuc");
}

#[test]
fn lines_are_brought_back_and_searched() {
    let mut session = Session::in_room(terminal(80));
    session.user_types("one\rtwo\rtwo\r\rdraft");
    for (keys, expected) in [
        ("\x1b[B", "draft|"),
        ("\x1b[A\x10\x1b[A", "one|"),
        ("!\x1b[B", "two|"),
        ("\x0e", "draft|"),
        ("\x1b[A\x1b[A\r\x1b[A", "one|"),
        // A line that was not sent stays too.
        ("\x1b[A", "draft|"),
        ("\x15three\rhalf\x12o", "one|"),
        ("\x12", "two|"),
        // No older line fits, so this one stays, and more letters still find it.
        ("\x12\x12", "one|"),
        ("n", "one|"),
        ("\x7f\x7ft", "three|"),
        // Another key accepts the line; the arrows go on from there.
        ("\x01!", "!|three"),
        ("\x1b[A", "one|"),
        ("\x1b[B\x1b[B", "half|"),
    ] {
        session.user_types(keys);
        assert_eq!(session.line(), expected, "{keys:?}");
    }
}

#[test]
fn the_latest_speakers_come_first() {
    let mut session = Session::in_room(terminal(80));
    session.server_says("USERS 4 ana bea bob bert\nMSG bob hi\nMSG bert hi\nMSG eve hi");
    assert_eq!(session.client.roster.by_speech(), ["bert", "bob", "ana", "bea"]);
    (0..=MAX_SPEAKERS).for_each(|number| session.client.roster.move_to_front(&number.to_string()));
    assert_eq!(session.client.roster.speakers.len(), MAX_SPEAKERS);
}

#[test]
fn a_long_line_is_shown_around_the_cursor() {
    for (keys, columns, expected) in [
        ("0123456789", 10, "0123456789|"),
        ("0123456789a", 10, "<6789a|"),
        ("0123456789abcdef\x02\x02", 10, "<6789abcd|ef"),
        ("0123456789abcdefghij\x02\x02\x02\x02\x02\x02", 10, "<6789abcd|e>"),
        ("0123456789abc\x01", 10, "|0123456789>"),
        ("日本語日本語", 5, "<|"),
        ("日本語日本語\x01", 5, "|日本>"),
        // A narrow window has no space for marks.
        ("abcdef\x02", 3, "cde|f"),
        ("ab", 1, "b|"),
        ("abc", 0, "|"),
    ] {
        // The cursor takes a column.
        let mut session = Session::in_room(terminal(80));
        session.user_types(keys);
        let (before, after) = session.client.screen.editor.view(columns + 1);
        assert_eq!(format!("{before}|{after}"), expected, "{keys:?}");
    }
}

#[test]
fn characters_are_as_wide_as_terminals_make_them() {
    for (columns, characters) in [
        // Marks of Latin, Hebrew, Arabic, Hindi, Thai and Japanese, one that encloses, and those of
        // emoji.
        (0, "\u{301}\u{5b8}\u{64e}\u{941}\u{902}\u{e35}\u{e48}\u{3099}\u{20dd}\u{fe0f}\u{200d}"),
        (1, "aãשبकกｱ…→│─"),
        (2, "日語か한👍⚽ᄀ⌚⭐︰、Ａ𠀀"),
    ] {
        for character in characters.chars() {
            assert_eq!(width_of(&format!("a{character}")), 1 + columns, "{character:?}");
        }
    }
}

#[test]
fn all_rows_except_the_first_are_indented() {
    for (line, columns, expected) in [
        ("0123456789", 10, "0123456789\n"),
        ("0123456789abcdefghij", 10, "0123456789\n  abcdefgh\n  ij\n"),
        ("ana:          eve: hi", 10, "ana:\n  eve: hi\n"),
        ("one two 34 five", 10, "one two 34\n  five\n"),
        ("one two  \tx", 8, "one two\n  x\n"),
        ("日本語日本語", 9, "日本語日\n  本語\n"),
        ("a\tb", 20, "a    b\n"),
        ("abc", 1, "a\nb\nc\n"),
        ("日本", 1, "\n日\n本\n"),
        // A wide URL is left to the terminal to fold; one that fits is a word like others.
        ("bob: see http://0123456789 ok", 10, "bob: see http://0123456789 ok\n"),
        ("bob: see http://0123456789ab ok", 10, "bob: see http://0123456789ab\n  ok\n"),
        ("https://0123456789 a", 10, "https://0123456789 a\n"),
        ("see http://ab ok", 12, "see\n   http://ab\n   ok\n"),
        ("\x1b[1mone two three\x1b[0m x", 10, "\x1b[1mone two\n  three\x1b[0m x\n"),
    ] {
        assert_eq!(wrap(line, columns), expected, "{line:?}");
    }
}

/// The terminal is asked for the cursor's position only if the cursor stood beyond the new edge.
#[test]
fn a_resize_erases_a_folded_line_and_keeps_messages_above_a_cut_one() {
    // Columns of the line without its prompt, of the narrower window; the answer; rows to go up.
    for (typed, columns, answer, rows) in [
        ("x".repeat(68), 60, 11, Some(1)),
        ("x".repeat(68), 30, 11, Some(2)),
        // A wide character leaves a column empty.
        ("日".repeat(34), 31, 13, Some(2)),
        // xterm leaves the cursor at the edge.
        ("x".repeat(68), 60, 60, None),
    ] {
        let mut session = Session::in_room(terminal(80));
        session.user_types(&typed);
        session.client.screen.draw("> ");
        session.client.screen.resize(columns);
        assert_eq!(mem::take(&mut session.client.screen.control), ASK_POSITION);
        session.user_types(&format!("\x1b[7;{answer}R"));
        let up = rows.map(|rows| format!("\x1b[{rows}A"));
        assert_eq!(session.client.screen.control, up.unwrap_or_default(), "{columns}, {answer}");
        assert_eq!(session.client.screen.asked, None);
    }
    let mut session = Session::in_room(terminal(80));
    session.user_types("half a line");
    session.client.screen.draw("> ");
    session.client.screen.resize(60);
    // The key F3 with Shift looks like an answer.
    session.user_types("\x1b[1;2R");
    assert_eq!(session.client.screen.control, "");
    // A terminal that does not answer is not waited for.
    session.client.screen.resize(10);
    assert!(session.client.wake_up() <= Instant::now() + POSITION_TIMEOUT);
    session.client.handle_due(session.client.wake_up());
    assert_eq!(session.client.screen.asked, None);
    // A terminal that does not know its size says 0.
    session.client.screen.resize(0);
    assert_eq!(session.client.screen.columns, 80);
}

#[test]
fn clearing_the_screen_keeps_pending_events_and_their_times() {
    let mut session = Session::in_room(Screen { shows_time: true, ..terminal(80) });
    session.server_says("MSG bob hi");
    session.user_types("\x0c");
    assert_eq!(session.client.screen.control, CLEAR);
    let shown = session.shown().replace(|c: char| c.is_ascii_digit(), "0");
    assert_eq!(shown, "\x1b[0m00:00\x1b[0m bob: hi\n");
}

#[test]
fn a_wide_prompt_disappears_while_the_user_types() {
    let mut screen = terminal(20);
    let wide = ".".repeat(20 - MIN_TO_TYPE + 1);
    assert!(screen.draw(&wide).contains(&wide));
    screen.editor.insert("hi");
    assert!(!screen.draw(&wide).contains('.'));
    assert!(screen.draw(&wide[1..]).contains(&wide[1..]));
}

#[test]
fn names_have_colours_and_messages_for_the_user_are_bold() {
    let coloured = Screen { has_colours: true, ..terminal(80) };
    assert_ne!(coloured.name("ana").replace("ana", "bob"), coloured.name("bob"));
    assert!(coloured.name("ana").ends_with("mana\x1b[0m"));
    let bob = coloured.name("bob");
    // Without colours, what is for the user still stands out.
    for (screen, bob, red) in [(coloured, &*bob, "\x1b[31m"), (terminal(80), "bob", "")] {
        let mut session = Session::in_room(screen);
        session.server_says("PRIV bob psst\nMSG bob hi Ana\nLEFT bob 1 quit\nERR bad-text no");
        let expected = format!(
            "\x1b[1m[private] bob: psst\x1b[0m\n\x07{bob}: \x1b[1mhi Ana\x1b[0m\n\x07\
             \x1b[2mbob left the chat. Online (1): ana\x1b[0m\n{red}Error: "
        );
        let shown = session.shown();
        assert!(shown.starts_with(&expected), "{shown:?}");
    }
}

#[test]
fn separators_and_isolates_are_not_shown() {
    assert_eq!(printable("\tmãe\u{2028}\u{2066}".as_bytes()), "\tmãe\\u{2028}\\u{2066}");
}

#[test]
fn the_bell_rings_for_the_name_as_a_word_with_or_without_accents() {
    let mut session = Session::in_room(plain());
    session.server_says("MSG bob I mean ana.\nMSG bob anã!\nMSG bob hi anabel and banana");
    session.server_says("MSG ana.b hello");
    let shown = "bob: I mean ana.\n\x07bob: anã!\n\x07bob: hi anabel and banana\nana.b: hello\n";
    assert_eq!(session.shown(), shown);
}

#[test]
fn keys_are_read_as_they_come_until_the_terminal_is_gone() {
    let (keyboard, typed) = sync_channel(8);
    // A folder cannot be read, like a terminal that is gone.
    let input = b"on".chain(&b"e\rtwo"[..]).chain(File::open("/").unwrap());
    read_input(BufReader::new(input), true, keyboard, sync_channel(8).0);
    assert_eq!(typed.iter().collect::<Vec<_>>(), [&b"on"[..], b"e\rtwo"]);
}

#[test]
fn both_languages_say_the_same() {
    for text in text::ALL {
        let [english, portuguese] = text;
        assert_eq!(english.matches("{}").count(), portuguese.matches("{}").count(), "{text:?}");
    }
    assert_eq!(say(text::JOINED, &["a{}b"]), "a{}b joined the chat.");
    for line in [text::HELP, text::USAGE].into_iter().flatten().flat_map(str::lines) {
        assert!(width_of(line) <= 80, "{line}");
    }
    let options = text::USAGE.map(|text| {
        let words = text.lines().filter_map(|line| line.trim().split(' ').next());
        words.filter(|word| word.starts_with("--")).collect::<Vec<_>>()
    });
    assert_eq!(options[0], options[1]);
}

#[test]
fn readme_shows_what_a_transcript_plays() {
    let readme = include_str!("../../README.md");
    let transcript = include_str!("../transcripts/terminal-line-survives-what-arrives.txt");
    let sample = readme.split("```").find(|it| it.contains("Welcome, ana!")).expect("a sample");
    for line in sample.trim().lines() {
        let step = match line.split_at_checked("00:00 ".len()) {
            Some((time, rest)) if time.get(2..3) == Some(":") => format!("ana sees \"*:* {rest}\""),
            _ if line.starts_with('>') => format!("ana shows \"{}\"", line.replace('█', "|")),
            _ => format!("ana sees \"{line}\""),
        };
        assert!(transcript.lines().any(|it| it == step), "{step}");
    }
}

#[test]
fn errors_are_translated() {
    for (explained, words) in [
        (explain_code("bad-text", "no"), "control characters cannot be sent; the line was not"),
        (explain_code("future", ""), "\"future\""),
        (explain(&ErrorKind::TimedOut.into()), "no answer"),
        (explain(&ErrorKind::ConnectionReset.into()), "it closed the connection"),
        (explain(&ErrorKind::ConnectionAborted.into()), "it closed the connection"),
        (explain(&io::Error::other("out of string")), "\"out of string\""),
    ] {
        assert_eq!(explained, words);
    }
}

#[test]
fn a_silent_server_gets_a_ping_and_then_times_out() {
    let mut session = Session::in_room(plain());
    for ping in ["PING 1\n", "PING 2\n"] {
        session.server_says("PONG 1");
        session.wait();
        assert_eq!(session.sent(), [ping]);
    }
    // A client that was suspended gives the server time again.
    let long_after = session.client.due + PAUSE;
    session.client.handle_due(long_after);
    assert_eq!(session.client.due, long_after + TIMEOUT);
    assert_eq!(session.client.end, None);
    session.wait();
    let lost = "lost the server at host:9999: it stopped answering".to_owned();
    assert_eq!(session.client.end, Some(Err(vec![lost])));
}

#[test]
fn a_second_ctrl_c_counts_for_two_seconds_and_a_third_does_not_wait_for_bye() {
    let mut session = Session::in_room(terminal(80));
    session.user_types("\x03");
    session.client.interrupted = session.client.interrupted.map(|at| at - CONFIRM_TIME);
    session.user_types("\x03");
    assert_eq!(session.shown().matches("Ctrl-C again, or Ctrl-D, leaves.").count(), 2);
    session.user_types("\x03");
    assert_eq!(session.sent(), ["QUIT\n"]);
    assert_eq!(session.client.end, None);
    session.user_types("\x03");
    assert_eq!(session.client.end, Some(Ok(())));
}

#[test]
fn reconnecting_backs_off_to_half_a_minute() {
    let mut session = Session::in_room(terminal(80));
    session.user_types("half a line");
    for expected in [0, 1, 2, 4, 8, 15, 30, 30, 30] {
        session.lose();
        let delay = session.client.due.saturating_duration_since(Instant::now());
        assert_eq!(delay.as_secs_f64().round() as u64, expected);
        assert_eq!(session.client.stage, Stage::Waiting);
        assert!(session.connections.try_recv().is_err());
        session.wait();
        session.connections.try_recv().expect("an attempt");
        // News of an old connection is ignored.
        for old in [Ok("BYE".to_owned()), Err((text::LOST, "late".to_owned()))] {
            session.client.handle(Event::Server(session.client.connection - 1, old));
        }
        assert_eq!(session.client.stage, Stage::Connecting);
    }
    assert_eq!(session.client.prompt(), "(not connected, attempt 9) > ");
    assert_eq!(session.line(), "half a line|");
    // The attempts are in the prompt alone.
    let shown = session.shown();
    assert_eq!(shown, "Error: lost the server at host:9999: gone; trying again\n");
    // Only a confirmed request resets the delay.
    session.server_says("HELLO linechat/1\nWELCOME ana 2");
    session.lose();
    assert_eq!(session.client.attempts, 10);
    session.wait();
    session.server_says("HELLO linechat/1\nWELCOME ana 2");
    session.wait();
    session.server_says("PONG 1");
    session.lose();
    assert_eq!(session.client.attempts, 1);
}

#[test]
fn reconnecting_keeps_the_name_and_resends_nothing() {
    let mut session = Session::in_room(terminal(80));
    session.user_types("one\rtwo\rhalf");
    session.server_says("PONG 1");
    session.shown();
    session.server_says("BYE server stops");
    assert!(session.shown().ends_with("trying again\nperhaps not sent: two\n"));
    // A line that is entered now stays in the editor.
    for is_waiting in [true, false] {
        session.user_types("\r");
        assert!(session.shown().contains("not connected; the line was not sent"));
        assert_eq!(session.line(), "half|");
        if is_waiting {
            session.wait();
        }
    }
    // The server pushes the roster of a hundred, so none is requested.
    session.server_says("HELLO linechat/1\nWELCOME ana 100");
    assert_eq!(session.sent(), ["NAME ana\n"]);
    session.user_types("\x15\x1b[A");
    assert_eq!(session.line(), "two|");
}

#[test]
fn name_taken_by_the_lost_connection_is_retried_for_two_minutes() {
    let mut session = Session::in_room(terminal(80));
    session.lose();
    for is_over in [false, false, true] {
        session.wait();
        session.server_says("HELLO linechat/1");
        if is_over {
            session.client.lost = session.client.lost.map(|lost| lost - GHOST);
        }
        session.server_says("ERR name-taken taken");
        assert_eq!(session.client.stage, if is_over { Stage::Asking } else { Stage::Waiting });
        assert_eq!(session.shown().contains("the name 'ana' was refused"), is_over);
    }
}

#[test]
fn the_user_can_leave_while_not_connected() {
    for keys in ["\x04", "/quit\r", "\x03\x03"] {
        let mut session = Session::in_room(terminal(80));
        session.lose();
        session.user_types(keys);
        assert_eq!(session.client.end, Some(Ok(())), "{keys:?}");
    }
    let mut session = Session::connecting(None, terminal(80));
    session.user_types("\x03");
    assert_eq!(session.client.end, Some(Ok(())));
}

#[test]
fn a_client_that_was_never_in_the_room_or_leaves_it_does_not_return() {
    let newcomer = Session::connecting(Some("ana"), terminal(80));
    let mut leaver = Session::in_room(terminal(80));
    leaver.user_types("\x04");
    for mut session in [newcomer, leaver] {
        session.lose();
        assert!(session.has_failed());
    }
}

#[test]
fn lines_do_not_renew_the_time_for_bye_or_a_confirmation() {
    for typed in ["/quit", "hi"] {
        let mut session = Session::in_room(plain());
        session.client.options.has_commands = true;
        session.user_types(typed);
        let due = session.client.due;
        session.server_says("WEATHER sunny\nPONG 2");
        assert_eq!(session.client.due, due);
        assert!(session.client.wake_up() <= due);
        session.wait();
        assert!(session.has_failed());
    }
}

#[test]
fn a_server_that_never_pauses_still_times_out() {
    let mut session = Session::in_room(plain());
    session.user_types("hi");
    session.client.due = Instant::now();
    let (events, happened) = sync_channel(2);
    events.send(Event::Server(1, Ok("WEATHER sunny".to_owned()))).unwrap();
    let (_keyboard, typed) = sync_channel(1);
    assert!(session.client.run(&happened, &typed).is_err());
}

#[test]
fn the_queue_of_lines_to_send_is_bounded() {
    let mut session = Session::in_room(plain());
    // This server confirms what it has not read.
    for number in 1..=2 * MAX_QUEUED {
        session.user_types("hi");
        session.server_says(&format!("PONG {number}"));
    }
    assert!(session.has_failed());
    assert_eq!(session.sent().len(), MAX_QUEUED);
}

#[test]
fn unconfirmed_requests_are_limited_and_listed() {
    let mut session = Session::in_room(plain());
    session.client.options.has_commands = true;
    ["one", "@bob two", "/list"].into_iter().for_each(|line| session.user_types(line));
    session.server_says("PONG 1\nERR no-such-user x");
    (0..MAX_UNCONFIRMED).for_each(|number| session.user_types(&number.to_string()));
    assert_eq!(session.sent().len(), MAX_UNCONFIRMED + 1);
    assert!(!session.client.can_take_more());
    session.server_says("PONG 2");
    assert_eq!(session.sent(), ["MSG 62\nPING 66\n"]);
    session.lose();
    let Some(Err(sentences)) = &session.client.end else { panic!("not the end") };
    assert_eq!(sentences[1], "perhaps not sent: 0");
    assert_eq!(sentences[63..], ["perhaps not sent: 62", "not sent: 63"]);
}

#[test]
fn a_line_typed_after_quit_is_sent_before_quit() {
    let mut session = Session::in_room(terminal(80));
    (0..MAX_UNCONFIRMED).for_each(|_| session.user_types("hi\r"));
    session.user_types("/quit\rlast\r");
    session.server_says("PONG 2");
    assert_eq!(session.sent()[MAX_UNCONFIRMED..], ["MSG last\nPING 65\n", "QUIT\n"]);
}

#[test]
fn enter_alone_takes_the_offered_name_once_and_history_holds_a_refused_one() {
    let mut session = Session::connecting(None, terminal(80));
    session.client.offer = Some("ana".to_owned());
    // Before the server greets, nothing is offered.
    session.user_types("\r");
    session.server_says("HELLO linechat/1 hi");
    assert!(session.sent().is_empty());
    session.user_types("\r");
    session.server_says("ERR name-taken no");
    session.user_types("\r \reve\r");
    assert_eq!(session.sent(), ["NAME ana\n", "NAME eve\n"]);
    session.server_says("WELCOME eve 1");
    // The history holds the name that was refused, not the other one.
    session.user_types("hello\r\x1b[A\x1b[A");
    assert_eq!(session.line(), "ana|");
}

#[test]
fn rosters_may_come_at_any_time_and_joined_and_left_update_them() {
    let mut session = Session::in_room(plain());
    session.client.roster.is_first = true;
    let long = "x".repeat(MAX_NAME + 1);
    for (lines, shown) in [
        ("USERS 3 zoe bob", ""),
        ("USERS 3 ana", "Users online (3): ana, bob, zoe\n"),
        ("JOINED Éva 4", "Éva joined the chat. Online (4): ana, bob, Éva, zoe\n"),
        ("USERS 4 zoe bob ana Éva", ""),
        ("LEFT bob 3 quit", "bob left the chat. Online (3): ana, Éva, zoe\n"),
        // If the roster and the count differ, or are large, only the count is shown.
        ("JOINED eve 9", "eve joined the chat. (9 online)\n"),
        ("USERS 10 a b c d e f g h i j\nJOINED k 11", "k joined the chat. (11 online)\n"),
        ("LEFT k 10 quit", "k left the chat. Online (10): a, b, c, d, e, f, g, h, i, j\n"),
        (&format!("USERS 2 {long} b\nJOINED {long} 3\nPRIV {long} hi"), ""),
        ("JOINED eve 2", "eve joined the chat. Online (2): b, eve\n"),
    ] {
        session.server_says(lines);
        assert_eq!(session.shown(), shown, "{lines}");
    }
    (0..=MAX_ROSTER).for_each(|number| session.client.roster.add(&number.to_string()));
    assert_eq!(session.client.roster.names.len(), MAX_ROSTER);
}

#[test]
fn the_log_holds_shown_lines_and_own_messages_without_styles() {
    let path = env::temp_dir().join(format!("linechat-log-{}", std::process::id()));
    let log = File::create_new(&path).unwrap();
    for screen in [Screen { has_colours: true, ..terminal(80) }, plain()] {
        let mut session = Session::in_room(screen);
        session.client.screen.log = log.try_clone().ok();
        session.user_types("hello");
        session.user_types("\r");
        session.server_says("PONG 1\nMSG bob hi\nSENT bob psst\nJOINED eve 4");
    }
    let written = std::fs::read_to_string(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    let texts = written.lines().map(|line| {
        let (time, text) = line.split_at("2026-11-26 01:02:03 ".len());
        assert_eq!(time.replace(|c: char| c.is_ascii_digit(), "0"), "0000-00-00 00:00:00 ");
        text
    });
    let both =
        ["ana: hello", "bob: hi", "[private to bob] psst", "eve joined the chat. (4 online)"];
    assert!(texts.eq([both, both].concat()), "{written}");
}

/// Returns the text that a command line asks for, and the options that it sets.
fn words(line: &str) -> Result<(Option<Text>, Options), (Text, String)> {
    let mut options = Options::default();
    let command = options.parse(line.split_terminator(' ').map(str::to_owned).collect())?;
    Ok((command, options))
}

#[test]
fn options_stand_anywhere() {
    let expected = Options {
        host: "host".to_owned(),
        port: 9999,
        is_portuguese: true,
        name: Some("ana".to_owned()),
        no_colours: true,
        no_times: true,
        bell: "\x07",
        is_quiet: true,
        no_reconnect: true,
        has_commands: true,
        log: Some("file".to_owned()),
        ..Options::default()
    };
    let line = "--bell host --lang pt ana --no-color --no-time --quiet --no-reconnect --commands \
                --log file";
    assert_eq!(words(line), Ok((None, expected)));
    for (option, text) in [("--help", text::USAGE), ("--version", text::VERSION)] {
        let (command, options) = words(&format!("--lang=pt {option}")).unwrap();
        assert_eq!((command, options.is_portuguese), (Some(text), true));
    }
}

#[test]
fn words_are_host_port_and_name_and_an_error_names_the_wrong_one() {
    for (line, expected) in [
        ("", Ok("localhost:9999 ")),
        ("::1", Ok("[::1]:9999 ")),
        ("[::1]", Ok("[::1]:9999 ")),
        ("[::1]:1", Ok("[::1]:1 ")),
        // The same order as for telnet and nc.
        ("host 23 ana", Ok("host:23 ana")),
        ("::1 23", Ok("[::1]:23 ")),
        ("host:1 23", Ok("host:1 23")),
        ("host 2b", Ok("host:9999 2b")),
        ("fe80::1%lo", Ok("[fe80::1%lo]:9999 ")),
        ("-- host -x", Ok("host:9999 -x")),
        ("--lang fr", Err((text::NO_SUCH_LANGUAGE, "fr"))),
        ("--lang", Err((text::NO_SUCH_LANGUAGE, ""))),
        ("--log", Err((text::NO_SUCH_OPTION, "--log="))),
        ("--colour", Err((text::NO_SUCH_OPTION, "--colour"))),
        ("host ana bob", Err((text::TOO_MANY_WORDS, "bob"))),
        ("localhost:99999", Err((text::BAD_PORT, "99999"))),
        ("localhost 0", Err((text::BAD_PORT, "0"))),
        ("-- localhost ana\nMSG", Err((text::CONTROL_IN_ARGUMENT, "ana\\nMSG"))),
    ] {
        let outcome = words(line).map(|(_, options)| {
            format!("{} {}", options.address(), options.name.unwrap_or_default())
        });
        let outcome = outcome.as_deref().map_err(|(text, word)| (*text, word.as_str()));
        assert_eq!(outcome, expected, "{line}");
    }
}

#[test]
fn the_first_variable_that_is_set_decides() {
    let from = |variables: &'static [(&str, &str)]| {
        move |name: &str| variables.iter().find(|it| it.0 == name).map(|it| it.1.to_owned())
    };
    assert_eq!(locale(from(&[("LANG", "en"), ("LC_MESSAGES", "pt")])), "pt");
    assert_eq!(locale(from(&[("LANG", "pt"), ("LC_MESSAGES", "pt"), ("LC_ALL", "C")])), "C");
    assert_eq!(login_name(from(&[("USER", "mãe-2_b.c")])), Some("mãe-2_b.c".to_owned()));
    // No member can have such a name.
    assert_eq!(login_name(from(&[("LOGNAME", "ana maria"), ("USER", "ana")])), None);
    assert_eq!(login_name(from(&[("USER", "a\u{1b}")])), None);
}

#[test]
fn every_address_of_a_host_is_tried() {
    // On most machines localhost is ::1 too, where no server listens.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    assert!(connect("localhost", port).is_ok());
}
