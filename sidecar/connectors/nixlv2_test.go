// SPDX-License-Identifier: Apache-2.0

package connectors

import (
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/baton-epp/baton/inference"
	"github.com/baton-epp/baton/pool"
)

var update = flag.Bool("update", false, "rewrite the golden files")

// handle is what a wire test's prefill answers: everything in it that a careless copy would change.
const handle = `{"do_remote_prefill":true, "do_remote_decode":false,"zz":9007199254740993,"a":{"n":1e400,"é\u00e9":"\u0041\/\n"},` +
	`"remote_block_ids":[[18446744073709551615,2],[ ]],"remote_engine_id":"e-1","remote_request_id":"cmpl-1-\"x\"","remote_host":"10.0.0.7",` +
	`"remote_port":5600,"transfer_mode":"pull","remote_num_tokens":41}`

func parse(tb testing.TB, api inference.API, body []byte) *inference.Request {
	tb.Helper()
	var b inference.Body
	b.Append(body[:len(body)/3]) // bodies come in chunks
	b.Append(body[len(body)/3:])
	r, err := inference.Parse(api, b)
	if err != nil {
		tb.Fatalf("%s: %v", body, err)
	}
	return r
}

func legs(t *testing.T, api inference.API, client []byte) (prefill, decode []byte) {
	t.Helper()
	r := parse(t, api, client)
	x := Exchange{Request: r}
	p, d := r.Edit(), r.Edit()
	p.StripTransferFields()
	d.StripTransferFields()
	nixlv2{}.Prefill(&x, p)
	nixlv2{}.Decode(&x, []byte(handle), d)
	prefill, decode = bytes.Join(p.Chunks(), nil), bytes.Join(d.Chunks(), nil)
	if len(prefill) != p.Len() || len(decode) != d.Len() {
		t.Errorf("lengths %d and %d, edits say %d and %d", len(prefill), len(decode), p.Len(), d.Len())
	}
	nixlv2{}.Withdraw(&x, d)
	if got := bytes.Join(d.Chunks(), nil); bytes.Contains(got, []byte("remote_engine_id")) || !json.Valid(got) {
		t.Errorf("after Withdraw: %s", got)
	}
	return prefill, decode
}

// TestGoldenLegs compares both legs of every API with reviewed files, byte for byte (vLLM NixlConnector, S0-22).
func TestGoldenLegs(t *testing.T) {
	apis := map[string]inference.API{
		"completions": inference.Completions, "chat": inference.Chat, "responses": inference.Responses,
		"messages": inference.Messages, "generate": inference.Generate, "generate_extra": inference.Generate,
	}
	for _, name := range slices.Sorted(maps.Keys(apis)) {
		t.Run(name, func(t *testing.T) {
			client, err := os.ReadFile(filepath.Join("testdata/nixlv2", name+".client.json"))
			if err != nil {
				t.Fatal(err)
			}
			prefill, decode := legs(t, apis[name], client)
			compare(t, "nixlv2/"+name+".prefill.golden.json", prefill)
			compare(t, "nixlv2/"+name+".decode.golden.json", decode)
			if !bytes.Contains(decode, []byte(handle)) {
				t.Error("the handle is not in the decode leg byte for byte")
			}
		})
	}
}

// fields decodes without losing digits.
func fields(t *testing.T, object []byte, without ...string) map[string]any {
	t.Helper()
	dec := json.NewDecoder(bytes.NewReader(object))
	dec.UseNumber()
	var m map[string]any
	if err := dec.Decode(&m); err != nil {
		t.Fatal(err)
	}
	for _, name := range without {
		delete(m, name)
	}
	return m
}

func capture(t *testing.T, name string) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("testdata/vllm", name))
	if err != nil {
		t.Fatal(err)
	}
	if strings.HasSuffix(name, ".http") {
		_, b, _ = bytes.Cut(bytes.ReplaceAll(b, []byte("\r\n"), []byte("\n")), []byte("\n\n"))
	}
	return b
}

// TestPrefillLegAsCaptured makes the prefill leg from the decode request of a captured pair, and compares it with the
// prefill request that a real vLLM 0.32 took.
func TestPrefillLegAsCaptured(t *testing.T) {
	f := func(api inference.API, decode, prefill, sent string, onlyOurs ...string) {
		t.Helper()
		client := bytes.Replace(capture(t, decode+".request.json"), []byte(`"temperature"`), []byte(sent+`"temperature"`), 1)
		got, _ := legs(t, api, client)
		ours := fields(t, got)
		for _, name := range onlyOurs {
			if _, ok := ours[name]; !ok {
				t.Errorf("%s: no %s", prefill, name)
			}
			delete(ours, name)
		}
		if diff := cmp.Diff(fields(t, capture(t, prefill+".request.json")), ours); diff != "" {
			t.Errorf("%s (-vllm +ours):\n%s", prefill, diff)
		}
	}
	f(inference.Completions, "decode_basic", "prefill_basic", "")
	f(inference.Chat, "decode_chat_stream", "prefill_chat", `"max_completion_tokens": 7, `)
	f(inference.Messages, "i_messages_decode", "i_messages_prefill", "", "stream")
	f(inference.Responses, "i_responses_decode", "i_responses_prefill", "", "stream")
}

// TestPrefillLegAsVLLMRouter compares with what vLLM's own router sent for the same clients' requests.
func TestPrefillLegAsVLLMRouter(t *testing.T) {
	bodies := func(name string) (out [][]byte) {
		for line := range strings.Lines(string(capture(t, name))) {
			if strings.HasPrefix(line, `{"model"`) && strings.Contains(line, `"remote_engine_id"`) && !strings.Contains(line, `"object"`) {
				out = append(out, []byte(line))
			}
		}
		return out
	}
	clients, want := bodies("vllm_router_decode_leg.txt"), bodies("vllm_router_prefill_leg.txt")
	if len(clients) != 2 || len(want) != 2 {
		t.Fatalf("%d and %d bodies", len(clients), len(want))
	}
	for i, api := range []inference.API{inference.Completions, inference.Chat} {
		got, _ := legs(t, api, clients[i])
		if diff := cmp.Diff(fields(t, want[i], "min_tokens"), fields(t, got)); diff != "" {
			t.Errorf("body %d (-router +ours):\n%s", i, diff)
		}
	}
}

// TestAnswerOfRealEngine takes handles out of captured answers, byte for byte.
func TestAnswerOfRealEngine(t *testing.T) {
	f := func(name string, verdict Verdict, tokens int64) {
		t.Helper()
		body := capture(t, name+".response.http")
		a := nixlv2{}.Answer(&Exchange{Request: &inference.Request{}}, body)
		if a.Verdict != verdict || a.PromptTokens != tokens || (a.Handle != nil) != (verdict == Ready) {
			t.Errorf("%s: %+v, want verdict %d and %d tokens", name, a, verdict, tokens)
		}
		if !bytes.Contains(body, a.Handle) {
			t.Errorf("%s: handle changed: %s", name, a.Handle)
		}
	}
	f("prefill_basic", Ready, 200)
	f("prefill_cached", Ready, 200)
	f("prefill_chat", Ready, 91)
	f("prefill_short", Ready, 5)
	f("i_messages_prefill", Ready, 251)
	f("i_responses_prefill", Ready, 251)
	f("decode_no_params", Missing, 200)
	f("generate", Missing, 4)
	f("b_stream", Malformed, 0)
}

// TestAnswer checks what makes a handle unusable (seen on vLLM 0.32: these end a decode server's process).
func TestAnswer(t *testing.T) {
	without := func(name string) string {
		m := fields(t, []byte(handle), name)
		b, err := json.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		return `{"choices":[{"finish_reason":"length"}],"kv_transfer_params":` + string(b) + `}`
	}
	wrap := func(params, finish string) string {
		return `{"choices":[{"finish_reason":"` + finish + `"}],"kv_transfer_params":` + params + `}`
	}
	f := func(name, answer string, want Verdict) {
		t.Helper()
		if got := (nixlv2{}).Answer(&Exchange{Request: &inference.Request{}}, []byte(answer)); got.Verdict != want {
			t.Errorf("%s: verdict %d, want %d", name, got.Verdict, want)
		}
	}
	f("good", wrap(handle, "length"), Ready)
	f("good after a stop", wrap(handle, "stop"), Ready)
	for _, name := range []string{
		"do_remote_prefill", "remote_engine_id", "remote_request_id", "remote_host", "remote_port", "remote_block_ids",
	} {
		f("no "+name, without(name), Incomplete)
		f("null "+name, wrap(strings.Replace(handle, `"`+name+`":`, `"`+name+`":null,"was_`+name+`":`, 1), "length"), Incomplete)
		f("later null "+name, wrap(strings.TrimSuffix(handle, "}")+`,"`+name+`":null}`, "length"), Incomplete)
		f("escaped null "+name, wrap(strings.TrimSuffix(handle, "}")+`,"`+fmt.Sprintf("\\u%04x", name[0])+name[1:]+`":null}`, "length"), Incomplete)
	}
	f("push needs no blocks", strings.Replace(without("remote_block_ids"), `"pull"`, `"push"`, 1), Ready)
	with := func(name, value string) string { // of duplicates the last counts
		return wrap(strings.TrimSuffix(handle, "}")+`,"`+name+`":`+value+`}`, "length")
	}
	for name, values := range map[string][]string{
		"do_remote_prefill": {"false", `"true"`, "1"},
		"remote_engine_id":  {`""`, "7", "[]", "{}", "true"},
		"remote_request_id": {`""`, "7", "[]", "{}", "true"},
		"remote_host":       {`""`, "7", "[]", "{}", "true"},
		"remote_port":       {`""`, `"http"`, "0", "65536", "-1", "5600.5", "[5600]", "true"},
		"remote_block_ids":  {"[null]", "[[null]]", "[[1],null]", "[1,null]", "7", `"[1]"`, "{}", `["1"]`, "[true]", "[1.5]"},
	} {
		for _, v := range values {
			f(name+" "+v, with(name, v), Incomplete)
		}
	}
	f("numeric port in a string", with("remote_port", `"5600"`), Ready)
	f("flat block ids of older engines", with("remote_block_ids", "[1, 2,18446744073709551615]"), Ready)
	f("everything cached", with("remote_block_ids", "[]"), Ready)
	f("everything cached, by group", with("remote_block_ids", "[[], [ ]]"), Ready)
	f("bare", wrap(`{"do_remote_prefill":true}`, "length"), Incomplete)
	f("no object", wrap(`[1]`, "length"), Incomplete)
	f("echo of what was asked", wrap(askForBlocks, "length"), Incomplete)
	f("null", wrap(`null`, "length"), Missing)
	f("stopped by itself", wrap(`null`, "stop"), Complete)
	f("engine error", wrap(handle, "error"), Failed)
	f("no JSON", `<html>`, Malformed)
	f("truncated", wrap(handle, "length")[:200], Malformed)
	f("empty", ``, Malformed)
	one := &inference.Request{MaxTokens: 1}
	if got := (nixlv2{}).Answer(&Exchange{Request: one}, []byte(wrap("null", "length"))); got.Verdict != Complete {
		t.Errorf("client wants one token: verdict %d", got.Verdict)
	}
}

// TestRewriteRemoteHost replaces a loopback name in place, and nothing else (vLLM NixlConnector).
func TestRewriteRemoteHost(t *testing.T) {
	f := func(host, prefiller string, rewrite bool, want string) {
		t.Helper()
		params := strings.Replace(handle, `"10.0.0.7"`, `"`+host+`"`, 1)
		x := &Exchange{
			Request: &inference.Request{}, RewriteHost: rewrite,
			Prefiller: &pool.Endpoint{Addr: netip.MustParseAddrPort(prefiller)},
		}
		a := nixlv2{}.Answer(x, []byte(`{"kv_transfer_params":`+params+`}`))
		if w := strings.Replace(handle, `"10.0.0.7"`, `"`+want+`"`, 1); string(a.Handle) != w || a.Rewritten != (host != want) {
			t.Errorf("%s at %s: rewritten %v\n got %s\nwant %s", host, prefiller, a.Rewritten, a.Handle, w)
		}
	}
	f("localhost", "10.0.0.9:8000", true, "10.0.0.9")
	f("LocalHost", "10.0.0.9:8000", true, "10.0.0.9")
	f("127.0.0.1", "10.0.0.9:8000", true, "10.0.0.9")
	f("127.3.2.1", "[fd00::9]:8000", true, "fd00::9")
	f("::1", "[::ffff:10.0.0.9]:8000", true, "10.0.0.9")
	f("0.0.0.0", "10.0.0.9:8000", true, "10.0.0.9")
	f("localhost", "127.0.0.1:8000", true, "localhost")
	f("localhost", "10.0.0.9:8000", false, "localhost")
	f("10.0.0.8", "10.0.0.9:8000", true, "10.0.0.8")
	f("prefill.svc", "10.0.0.9:8000", true, "prefill.svc")
}

// TestClientTransferFields shows that what a client sends in transfer fields reaches neither leg.
func TestClientTransferFields(t *testing.T) {
	for _, client := range []string{
		`{"kv_transfer_params":{"evil":1},"prompt":"x","k\u0076_transfer_params":{"evil":2},"bootstrap_host":"evil","max_tokens":3}`,
		`{"prompt":"x","sampling_params":{"extra_args":{"kv_transfer_params":{"evil":1}}},"vllm_xargs":{"kv_transfer_params":"evil"}}`,
	} {
		prefill, decode := legs(t, inference.Completions, []byte(client))
		if bytes.Contains(append(prefill, decode...), []byte("evil")) {
			t.Errorf("%s\nprefill %s\ndecode %s", client, prefill, decode)
		}
	}
	prefill, decode := legs(t, inference.Generate, []byte(
		`{"token_ids":[1],"sampling_params":{"extra_args":{"kv_transfer_params":{"evil":1},"mine":1},"max_tokens":3}}`))
	for _, leg := range [][]byte{prefill, decode} {
		if bytes.Contains(leg, []byte("evil")) || !bytes.Contains(leg, []byte(`"mine":1`)) {
			t.Errorf("generate: %s", leg)
		}
	}
}

func TestLookup(t *testing.T) {
	f := func(name, want string) {
		t.Helper()
		_, traits, err := Lookup(name)
		switch {
		case want == "" && (err != nil || traits.Name != name):
			t.Errorf("%s: %+v, %v", name, traits, err)
		case want != "" && (err == nil || !strings.Contains(err.Error(), want)):
			t.Errorf("%s: %v, want %q", name, err, want)
		}
	}
	built := strings.Join(slices.Sorted(maps.Keys(registry())), ", ")
	for name := range registry() {
		f(name, "")
	}
	f("nixl", "is not a connector (built: "+built+")")
}

// FuzzMembers compares the scan of a handle with encoding/json.
func FuzzMembers(f *testing.F) {
	f.Add(handle)
	f.Add(`{}`)
	f.Add(`{ "remote_host" : {"remote_port":1} , "remote_port" : [ "]" , {} ] }`)
	f.Add(`{"remote_host":"\\","remote_host":"\"}","remote_port":-1.5e3}`)
	f.Fuzz(func(t *testing.T, object string) {
		object = strings.TrimSpace(object)
		var want map[string]json.RawMessage
		if json.Unmarshal([]byte(object), &want) != nil || object[0] != '{' {
			t.Skip("no JSON object")
		}
		names := []string{"remote_host", "remote_port", ""}
		found := make([]inference.Span, len(names))
		members([]byte(object), names, found)
		for i, name := range names {
			if got := text([]byte(object), found[i]); got != string(want[name]) {
				t.Errorf("%q of %s: %q, want %q", name, object, got, want[name])
			}
		}
	})
}
