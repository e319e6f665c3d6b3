// SPDX-License-Identifier: Apache-2.0

package simulate

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/tinylib/msgp/msgp"
)

// idPrompt is n token ids from first on.
func idPrompt(first, n int) string {
	ids := make([]string, n)
	for i := range ids {
		ids[i] = strconv.Itoa(first + i)
	}
	return "[" + strings.Join(ids, ",") + "]"
}

func kvFrame(t *testing.T, name string) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("testdata", "kvevents", name))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// withoutTime is a payload without the time of its batch: the eight bytes of a double behind 0x93 0xcb.
func withoutTime(t *testing.T, payload []byte) []byte {
	t.Helper()
	if len(payload) < 10 || payload[0] != 0x93 || payload[1] != 0xcb {
		t.Fatalf("payload % x: no array of three that begins with a double", payload)
	}
	return payload[10:]
}

// The hashes are the engine's own, so that what reproduces or routes by them can be tried.
func TestKVEventHashesAreTheEngines(t *testing.T) {
	var vectors []struct {
		What   string   `json:"what"`
		Seed   string   `json:"seed"`
		None   string   `json:"none_hash"`
		Size   int      `json:"block_size"`
		First  int      `json:"first_token"`
		Tokens int      `json:"tokens"`
		Hashes []string `json:"block_hashes"`
		Ints   []uint64 `json:"as_int64"`
	}
	if err := json.Unmarshal(kvFrame(t, "hash_vectors.json"), &vectors); err != nil || len(vectors) != 4 {
		t.Fatalf("%d vectors, %v", len(vectors), err)
	}
	for _, v := range vectors {
		extra := &extraKeys{}
		switch {
		case strings.HasPrefix(v.What, "cache_salt"):
			extra.salt = "tenant-a"
		case strings.HasPrefix(v.What, "LoRA"):
			extra.lora = "sql"
		}
		root := rootHash(v.Seed)
		if got := hex.EncodeToString(root[:]); got != v.None {
			t.Errorf("%s: root %s, want %s", v.What, got, v.None)
		}
		if v.Seed == defaultHashSeed && root != rootHash("") {
			t.Errorf("%s: is not the default", v.What)
		}
		q := &sequence{extra: extra}
		for i := range v.Tokens {
			q.tokens = append(q.tokens, uint32(v.First+i))
		}
		events := &kvEvents{root: root, size: v.Size}
		for i, want := range v.Hashes {
			h := q.hash(events, i)
			if got := hex.EncodeToString(h[:]); got != want {
				t.Errorf("%s: block %d is %s, want %s", v.What, i, got, want)
			}
			if got := binary.BigEndian.Uint64(events.appendHash(nil, h)[1:]); got != v.Ints[i] {
				t.Errorf("%s: block %d as a number is %d, want %d", v.What, i, got, v.Ints[i])
			}
		}
	}
}

// Media enter the hash untagged, as the engine's source has it.
func TestKVEventExtraKeysOfMedia(t *testing.T) {
	x := &extraKeys{lora: "sql", salt: "s", media: []mediaItem{{key: "a", offset: 10}, {key: "b", offset: 10 + mediaTokens}}}
	f := func(at int, want string) {
		t.Helper()
		if got := payloadText(appendExtra(nil, x.of(at, 32))); got != want {
			t.Errorf("block %d: %s, want %s", at, got, want)
		}
	}
	f(0, `["sql",["a",10],"s"]`)
	f(1, `["sql",["a",-22]]`)
	f(2, `["sql",["a",-54],["b",10]]`)
	f(4, `["sql",["b",-54]]`)
	f(5, `["sql"]`)
	b := []byte{}
	for _, k := range x.of(1, 32)[1:] {
		b = k.cbor(b)
	}
	if want := "82" + "6161" + "35"; hex.EncodeToString(b) != want { // ["a", -22]
		t.Errorf("in CBOR: %x, want %s", b, want)
	}
}

// The same requests in the same order as those that were captured: the same bytes but for the time.
func TestKVEventsAsCaptured(t *testing.T) {
	e := newEngine(t, Options{
		BlockSize: 32, HashSeed: "0", LoRAs: []string{"sql", "chat"},
		KVEvents: KVEvents{Endpoint: "tcp://*:0", HashBytes: true},
	})
	sub := subscribe(t, e, 0, "")
	steps := []struct{ name, body string }{
		{"bytes_stored", complete(idPrompt(300, 70), 1, "")},
		{"bytes_stored_lora", strings.Replace(complete(idPrompt(300, 70), 1, ""), `"tiny"`, `"sql"`, 1)},
		{"bytes_stored_cache_salt", complete(idPrompt(300, 70), 1, `,"cache_salt":"tenant-a"`)},
		{"bytes_cleared_then_stored", complete(idPrompt(300, 70), 1, "")},
	}
	for i, s := range steps {
		if i == len(steps)-1 {
			if r := post(t, e, "/reset_prefix_cache", ""); r.status != http.StatusOK {
				t.Fatal(r.status)
			}
			settle(t, e)
		}
		text(t, post(t, e, "/v1/completions", s.body))
		m := sub.next(t)
		if m.topic != "" || !bytes.Equal(m.seq, kvFrame(t, s.name+".frame1.bin")) {
			t.Errorf("%s: topic %q, sequence % x", s.name, m.topic, m.seq)
		}
		if want := kvFrame(t, s.name+".frame2.bin"); !bytes.Equal(withoutTime(t, m.payload), withoutTime(t, want)) {
			t.Errorf("%s:\n%s\nwant\n%s", s.name, payloadText(m.payload), payloadText(want))
		}
	}
}

// Captures whose hashes cannot be reproduced (SHA-256 of a pickle) have the same fields, types and order of keys, and the
// same values where they do not hang on hashes.
func TestKVEventsShapedAsCaptured(t *testing.T) {
	e := newEngine(t, Options{
		BlockSize: 32, NumBlocks: 56,
		KVEvents: KVEvents{Endpoint: "tcp://*:0", StepTokens: 512, Topic: string(kvFrame(t, "int_stored_with_parent.frame0.bin"))},
	})
	sub := subscribe(t, e, 0, "kv@127.0.0.1:18000@")
	f := func(capture string) {
		t.Helper()
		got, want := eventShapes(sub.next(t).payload), eventShapes(kvFrame(t, capture+".frame2.bin"))
		if !slices.Equal(got, want) {
			t.Errorf("%s:\n%s\nwant\n%s", capture, strings.Join(got, "\n"), strings.Join(want, "\n"))
		}
	}
	// The answer fills the prompt's third block while it decodes. Four blocks are used, one of them not full.
	text(t, post(t, e, "/v1/completions", complete(idPrompt(300, 70), 40, "")))
	sub.next(t)
	f("int_stored_with_parent")
	text(t, post(t, e, "/v1/completions", complete(idPrompt(300, 96), 1, `,"cache_salt":"tenant-a"`)))
	f("int_stored_cache_salt")
	text(t, post(t, e, "/v1/completions", complete(idPrompt(1000, 640), 1, ""))) // in two steps
	sub.next(t)
	sub.next(t)
	// 28 blocks were never used: 16 go to the first step, 12 to the second, which takes the first request's four too.
	text(t, post(t, e, "/v1/completions", complete(idPrompt(2000, 1600), 1, "")))
	if shapes := eventShapes(sub.next(t).payload); len(shapes) != 1 {
		t.Errorf("a step into free blocks: %s", shapes)
	}
	f("int_removed_then_stored")
	f("int_removed_many_stored")
}

// eventShapes is the shape of each event of a payload with hashes and tokens blanked.
func eventShapes(payload []byte) (out []string) {
	for _, event := range decoded(payload).([]any)[1].([]any) {
		var b strings.Builder
		for _, f := range event.([]pair) {
			switch v := f.value.(type) {
			case []any:
				if len(v) > 0 && f.key != "extra_keys" {
					fmt.Fprintf(&b, "%s:%d×%T ", f.key, len(v), v[0])
					continue
				}
			case uint64:
				if f.key == "parent_block_hash" {
					fmt.Fprintf(&b, "%s:%T ", f.key, v)
					continue
				}
			}
			fmt.Fprintf(&b, "%s:%s ", f.key, inWords(f.value))
		}
		out = append(out, b.String())
	}
	return out
}

// pair is a map's entry: the order of keys is part of what is compared.
type pair struct {
	key   string
	value any
}

// decoded reads msgpack without knowing what to expect; nil for what is no msgpack.
func decoded(b []byte) any {
	v, rest, err := decodeOne(b)
	if err != nil || len(rest) > 0 {
		return nil
	}
	return v
}

func decodeOne(b []byte) (v any, rest []byte, err error) {
	var n uint32
	switch msgp.NextType(b) {
	case msgp.MapType:
		n, b, err = msgp.ReadMapHeaderBytes(b)
		out := []pair{}
		for range n {
			var p pair
			if p.key, b, err = msgp.ReadStringBytes(b); err == nil {
				p.value, b, err = decodeOne(b)
			}
			if err != nil {
				return nil, nil, err
			}
			out = append(out, p)
		}
		return out, b, err
	case msgp.ArrayType:
		n, b, err = msgp.ReadArrayHeaderBytes(b)
		out := []any{}
		for range n {
			var one any
			if one, b, err = decodeOne(b); err != nil {
				return nil, nil, err
			}
			out = append(out, one)
		}
		return out, b, err
	case msgp.BinType:
		v, rest, err = msgp.ReadBytesBytes(b, nil)
	case msgp.IntType, msgp.UintType:
		var i int64
		if v, rest, err = msgp.ReadUint64Bytes(b); err != nil {
			i, rest, err = msgp.ReadInt64Bytes(b)
			v = i
		}
	default:
		v, rest, err = msgp.ReadIntfBytes(b)
	}
	return v, rest, err
}

func payloadText(payload []byte) string { return inWords(decoded(payload)) }

func inWords(v any) string {
	var parts []string
	switch v := v.(type) {
	case []pair:
		for _, p := range v {
			parts = append(parts, p.key+":"+inWords(p.value))
		}
		return "{" + strings.Join(parts, ",") + "}"
	case []any:
		for _, one := range v {
			parts = append(parts, inWords(one))
		}
		return "[" + strings.Join(parts, ",") + "]"
	case string:
		return fmt.Sprintf("%q", v)
	case []byte:
		return hex.EncodeToString(v)
	}
	return fmt.Sprint(v)
}
