// SPDX-License-Identifier: Apache-2.0

package connectors

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/baton-epp/baton/inference"
	"github.com/baton-epp/baton/pool"
)

// facts are those of an endpoint with three ranks.
const facts = ` {"0":{"engine_id":"e-0","worker_addr":{"0":{"0":"tcp://10.0.0.9:1"}}}, "2" : {"x":9007199254740993,` +
	`"engine_id":"gone","engine\u005fid":"\u0065-\"2\"\/"},"10":{"engine_id":"e-10"},"0":{"engine_id":"e-0b"} }`

// bothLegs compares both legs with golden files, less what was minted, and shows that Withdraw gives the client's body
// back.
func bothLegs(t *testing.T, wire Connector, name string, x *Exchange, unminted func(leg []byte) []byte) (prefill, decode []byte) {
	t.Helper()
	p, d := stripped(x.Request), stripped(x.Request)
	wire.Prefill(x, p)
	want := string(written(t, d))
	wire.Decode(x, nil, d)
	prefill, decode = written(t, p), written(t, d)
	compare(t, name+".prefill.golden.json", unminted(prefill))
	compare(t, name+".decode.golden.json", unminted(decode))
	checkUnmoved(t, x.Request, prefill, prefillEdits)
	checkUnmoved(t, x.Request, decode, decodeEdits)
	if bytes.Contains(append(prefill, decode...), []byte("evil")) {
		t.Errorf("what the client sent is in a leg: %s\n%s", prefill, decode)
	}
	wire.Withdraw(x, d)
	if string(written(t, d)) != want {
		t.Errorf("after Withdraw: %s\nwant %s", written(t, d), want)
	}
	return prefill, decode
}

// TestMooncakeLegs compares both legs of every API with reviewed files (vLLM MooncakeConnector).
func TestMooncakeLegs(t *testing.T) {
	wire, traits, err := Lookup("mooncake")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range slices.Sorted(maps.Keys(clients)) {
		if !traits.Serves(clients[name]) {
			continue
		}
		t.Run(name, func(t *testing.T) {
			x := between(client(t, name))
			x.Facts = []byte(facts)
			x.Prefiller = &pool.Endpoint{Addr: x.Prefiller.Addr, Rank: 2, Labels: map[string]string{MooncakePortLabel: "8999"}}
			bothLegs(t, wire, "mooncake/"+name, x, func(leg []byte) []byte { return withoutIDs(x, leg) })
			if x.Rank != 2 || !strings.HasPrefix(x.Ticket, "xfer-") {
				t.Errorf("rank %d, ticket %s", x.Rank, x.Ticket)
			}
		})
	}
}

// TestMooncakeRank shows that the rank is the endpoint's own where it has one, that otherwise all are used, and that
// decode gets the engine of the same one.
func TestMooncakeRank(t *testing.T) {
	f := func(rank int, facts string, want map[int]string) {
		t.Helper()
		seen := map[int]bool{}
		for range 200 {
			x := between(client(t, "chat"))
			x.Facts, x.Prefiller = []byte(facts), &pool.Endpoint{Addr: x.Prefiller.Addr, Rank: rank}
			mooncake{}.Prefill(x, stripped(x.Request))
			body := stripped(x.Request)
			mooncake{}.Decode(x, nil, body)
			engine, ok := want[x.Rank]
			if !ok || !bytes.Contains(written(t, body), []byte(`"remote_engine_id":`+engine+`,`)) {
				t.Fatalf("rank %d of %s: rank %d, %s", rank, facts, x.Rank, written(t, body))
			}
			seen[x.Rank] = true
			other := *x
			mooncake{}.Decode(&other, nil, body)
		}
		if len(seen) != len(want) {
			t.Errorf("rank %d of %s: only %v", rank, facts, seen)
		}
	}
	f(2, facts, map[int]string{2: `"\u0065-\"2\"\/"`})
	f(0, facts, map[int]string{0: `"e-0b"`, 2: `"\u0065-\"2\"\/"`, 10: `"e-10"`})
	f(7, `{"0":{"engine_id":"only"}}`, map[int]string{0: `"only"`})

	x := between(client(t, "chat"))
	x.Facts = nil
	body := stripped(x.Request)
	mooncake{}.Prefill(x, stripped(x.Request))
	if mooncake.Decode(mooncake{}, x, nil, body); x.Rank != -1 || bytes.Contains(written(t, body), []byte(transferField)) {
		t.Errorf("without facts: rank %d, %s", x.Rank, written(t, body))
	}
}

func TestMooncakeIntroduce(t *testing.T) {
	x := between(nil)
	if at, path := (mooncake{}).Introduce(x); at != 8998 || path != "/query" {
		t.Errorf("%d %s", at, path)
	}
	x.Prefiller.Labels = map[string]string{MooncakePortLabel: "65535"}
	if at, _ := (mooncake{}).Introduce(x); at != 65535 {
		t.Errorf("with a label: %d", at)
	}
	f := func(answer string, ok bool) {
		t.Helper()
		if err := (mooncake{}).Introduced([]byte(answer)); (err == nil) != ok {
			t.Errorf("%.80s: %v", answer, err)
		}
	}
	f(facts, true)
	f(`{"0":{"engine_id":"e"}}`, true)
	for _, bad := range []string{
		``, `{}`, `[]`, `null`, `"0"`, `{"0":{"engine_id":"e"}`, `{"0":{"engine_id":"e"}}x`, `{"0":{"engine_id":NaN}}`,
		`{"0":{}}`, `{"0":{"engine_id":""}}`, `{"0":{"engine_id":7}}`, `{"0":{"engine_id":null}}`, `{"0":"e"}`, `{"0":null}`,
		`{"a":{"engine_id":"e"}}`, `{"":{"engine_id":"e"}}`, `{"-1":{"engine_id":"e"}}`, `{"65536":{"engine_id":"e"}}`,
		`{"0":{"engine_id":"` + strings.Repeat("e", maxEngineID) + `"}}`, `{"0":{"engine_id":"e","x":"` + strings.Repeat("e", maxFacts) + `"}}`,
	} {
		f(bad, false)
	}
	many := make([]string, maxRanks+1)
	for i := range many {
		many[i] = fmt.Sprintf(`"%d":{"engine_id":"e"}`, i)
	}
	f("{"+strings.Join(many[1:], ",")+"}", true)
	f("{"+strings.Join(many, ",")+"}", false)
}

// FuzzIntroduced lets a bootstrap server say anything: what is taken can be spliced.
func FuzzIntroduced(f *testing.F) {
	for _, seed := range []string{facts, `{}`, `{"0":{"engine_id":"e"}}`, `{"0":{"engine_id":"\ud800"},"1":{"engine_id":"\\"}}`} {
		f.Add([]byte(seed))
	}
	r := client(f, "chat")
	f.Fuzz(func(t *testing.T, answer []byte) {
		x := between(r)
		x.Facts = answer
		mooncake{}.Prefill(x, stripped(r))
		body := stripped(r)
		mooncake{}.Decode(x, nil, body)
		leg := written(t, body)
		if taken := mooncake.Introduced(mooncake{}, answer) == nil; taken != bytes.Contains(leg, []byte(`"remote_engine_id"`)) {
			t.Errorf("%q: taken %v, leg %s", answer, taken, leg)
		}
	})
}

// roomsOf are the rooms of a ticket, one or a list.
func roomsOf(rooms string) []string { return strings.Split(strings.Trim(rooms, "[]"), ",") }

// unroomed replaces the rooms and the nonce of an exchange.
func unroomed(x *Exchange) func(leg []byte) []byte {
	rid, rooms, _ := strings.Cut(x.Ticket, " ")
	pairs := []string{rid, rid[:len(rid)-16] + "0123456789abcdef"}
	for i, room := range roomsOf(rooms) {
		pairs = append(pairs, room, strconv.Itoa(9007199254740993+i))
	}
	return func(leg []byte) []byte { return []byte(strings.NewReplacer(pairs...).Replace(string(leg))) }
}

// TestSGLangLegs compares both legs of every API, and of batches, with reviewed files (SGLang's gateway, kv bootstrap).
func TestSGLangLegs(t *testing.T) {
	wire, traits, err := Lookup("sglang")
	if err != nil {
		t.Fatal(err)
	}
	f := func(name string, r *inference.Request, rooms int) {
		t.Helper()
		t.Run(name, func(t *testing.T) {
			x := between(r)
			x.Request.ID = "client/id \"1\"\n"
			prefill, decode := bothLegs(t, wire, "sglang/"+name, x, func(leg []byte) []byte { return unroomed(x)(leg) })
			if _, list, _ := strings.Cut(x.Ticket, " "); len(roomsOf(list)) != rooms {
				t.Errorf("rooms %s, want %d", list, rooms)
			}
			p, d := fields(t, prefill), fields(t, decode)
			for _, name := range append(sglangFields, "rid") {
				if fmt.Sprint(p[name]) != fmt.Sprint(d[name]) || p[name] == nil {
					t.Errorf("%s: %v at prefill, %v at decode", name, p[name], d[name])
				}
			}
			if fmt.Sprint(p["n"]) != fmt.Sprint(d["n"]) {
				t.Errorf("n: %v at prefill, %v at decode", p["n"], d["n"])
			}
			path, body := sglang{}.Abort(x)
			first, _ := d["rid"].(string)
			if rids, ok := d["rid"].([]any); ok {
				first = fmt.Sprint(rids[0])
				for _, rid := range rids {
					if !strings.HasPrefix(fmt.Sprint(rid), first) {
						t.Errorf("%v is not aborted with %s", rid, first)
					}
				}
			}
			if path != "/abort_request" || string(body) != `{"rid":"`+first+`"}` || !regexp.MustCompile(`^client_id__1__-[0-9a-f]{16}$`).MatchString(first) {
				t.Errorf("abort %s %s", path, body)
			}
		})
	}
	for _, name := range slices.Sorted(maps.Keys(clients)) {
		if traits.Serves(clients[name]) {
			f(name, client(t, name), 1)
		}
	}
	for name, rooms := range map[string]int{"batch_text": 3, "batch_ids": 2, "batch_completions": 2} {
		body, err := os.ReadFile(filepath.Join("testdata/sglang", name+".client.json"))
		if err != nil {
			t.Fatal(err)
		}
		api := inference.SGLangGenerate
		if strings.HasSuffix(name, "completions") {
			api = inference.Completions
		}
		f(name, parse(t, api, body), rooms)
	}
}

// TestSGLangRooms shows that rooms differ and fit 63 bits, in one request and among many, and how long batches go.
func TestSGLangRooms(t *testing.T) {
	seen := map[string]bool{}
	f := func(prompts, want int) {
		t.Helper()
		x := between(&inference.Request{API: inference.Completions, Prompts: prompts, ID: strings.Repeat("é", 300)})
		x.Ticket = sglangTicket(x.Request)
		rid, rooms, _ := strings.Cut(x.Ticket, " ")
		list := append([]string{rid}, roomsOf(rooms)...)
		if len(list)-1 != want || len(rid) > maxRequestID*2+17 {
			t.Fatalf("%d prompts: %d rooms, request id %s", prompts, len(list)-1, rid)
		}
		for _, room := range list {
			if seen[room] {
				t.Errorf("%s twice", room)
			}
			seen[room] = true
		}
		for _, room := range list[1:] {
			if n, err := strconv.ParseInt(room, 10, 64); err != nil || n < 0 {
				t.Errorf("room %s: %v", room, err)
			}
		}
	}
	for range 1000 {
		f(1, 1)
	}
	f(0, 1)
	f(3, 3)
	f(maxRooms, maxRooms)
	f(maxRooms+1, 1)
	f(1<<30, 1)
	if path, body := (sglang{}).Abort(&Exchange{}); path != "" || body != nil {
		t.Errorf("without a ticket %s %s would end every request", path, body)
	}
}

func TestSGLangAnswer(t *testing.T) {
	f := func(answer string, want Verdict, tokens, cached int64) {
		t.Helper()
		a := sglang{}.Answer(&Exchange{}, []byte(answer))
		if a.Verdict != want || a.PromptTokens != tokens || a.CachedTokens != cached || a.Handle != nil {
			t.Errorf("%s: %+v", answer, a)
		}
	}
	const one = `{"text":"","meta_info":{"id":"x","finish_reason":{"type":"length","length":1},"prompt_tokens":41,"cached_tokens":32}}`
	f(one, Ready, 41, 32)
	f(" ["+one+" , "+one+"] \n", Ready, 82, 64)
	f(`{"choices":[{"finish_reason":"length"}],"usage":{"prompt_tokens":41,"prompt_tokens_details":null}}`, Ready, 41, -1)
	f(`{"choices":[{"finish_reason":"length"}],"usage":{"prompt_tokens":41,"prompt_tokens_details":{"cached_tokens":32}}}`, Ready, 41, 32)
	f(`{"choices":[{"finish_reason":"abort"}]}`, Failed, 0, -1)
	f(`{"meta_info":{"finish_reason":{"type":"abort","message":"x","status_code":500}}}`, Failed, 0, -1)
	f(`[`+one+`,{"meta_info":{"finish_reason":{"type":"abort"}}}]`, Failed, 0, -1)
	f(`{"error":{"message":"x"}}`, Failed, 0, -1)
	f(`{"object":"error","message":"x"}`, Failed, 0, -1)
	for _, bad := range []string{``, `[]`, `[ ]`, `[1]`, `[`, `[]]`, `[{}`, `[],"":[]`, `["x"]`, `null`, `<html>`} {
		f(bad, Malformed, 0, -1)
	}
	var sum Answer
	huge := `{"meta_info":{"prompt_tokens":9223372036854775807,"cached_tokens":9223372036854775807}}`
	if sum = (sglang{}).Answer(&Exchange{}, []byte("["+strings.Repeat(huge+",", 99)+huge+"]")); sum.PromptTokens < 0 || sum.CachedTokens < 0 {
		t.Errorf("sums overflow: %+v", sum)
	}
	if !json.Valid([]byte(huge)) {
		t.Error("the test is no JSON")
	}
}
