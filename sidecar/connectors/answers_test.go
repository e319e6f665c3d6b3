// SPDX-License-Identifier: Apache-2.0

package connectors

import (
	"net/netip"
	"os"
	"strings"
	"testing"

	"github.com/baton-epp/baton/inference"
	"github.com/baton-epp/baton/pool"
)

// verdicts returns a check of what wire makes of an answer to r.
func verdicts(t *testing.T, wire Connector, r *inference.Request) func(name, answer string, want Verdict) {
	t.Helper()
	return func(name, answer string, want Verdict) {
		t.Helper()
		x := between(r)
		if got := wire.Answer(x, []byte(answer)); got.Verdict != want || got.Handle != nil && want != Ready {
			t.Errorf("%s: %+v, want verdict %d", name, got, want)
		}
	}
}

func answerOf(t *testing.T, file string) string {
	t.Helper()
	b, err := os.ReadFile("testdata/" + file)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// TestBlindAnswers takes any answer that reports no error.
func TestBlindAnswers(t *testing.T) {
	for _, wire := range []Connector{sharedStorage{}, offloading{}} {
		f := verdicts(t, wire, client(t, "completions"))
		f("length", `{"choices":[{"finish_reason":"length"}]}`, Ready)
		f("stopped by itself", `{"choices":[{"finish_reason":"stop"}]}`, Ready)
		f("error inside a 200", `{"choices":[{"finish_reason":"error"}]}`, Failed)
		f("error object", `{"error":{"message":"no"}}`, Failed)
		f("older error object", `{"object":"error","message":"no"}`, Failed)
		f("failed response", `{"object":"response","status":"failed","error":{"code":"x"}}`, Failed)
		f("no error", `{"object":"response","status":"completed","error":null}`, Ready)
		f("no object", `[]`, Malformed)
		f("cut off", `{"choices":[`, Malformed)
	}
}

// TestCacheHitThreshold asks decode first where the client sent a threshold, and lets no later leg refuse to compute
// (vLLM RFC 24256, llm-d's shared-storage connector).
func TestCacheHitThreshold(t *testing.T) {
	const with = `{"cache_hit_threshold":0.80,"prompt":"x","max_tokens":9,"min_tokens":2,"stream":true}`
	f := func(body, question, prefill, decode string) {
		t.Helper()
		r := parse(t, inference.Completions, []byte(body))
		wire, x := sharedStorage{}, between(r)
		q, p, d, w := stripped(r), stripped(r), stripped(r), stripped(r)
		if asks := wire.Ask(x, q); asks != (question != "") {
			t.Errorf("%s: asks %v", body, asks)
		}
		if got := string(written(t, q)); question != "" && got != question {
			t.Errorf("question %s", got)
		}
		wire.Prefill(x, p)
		wire.Decode(x, nil, d)
		wire.Withdraw(x, w)
		if got := string(written(t, p)); got != prefill {
			t.Errorf("prefill %s", got)
		}
		if got := string(written(t, d)); got != decode {
			t.Errorf("decode %s", got)
		}
		if got := string(written(t, w)); got != decode {
			t.Errorf("withdrawn %s", got)
		}
	}
	f(with,
		`{"cache_hit_threshold":0.80,"prompt":"x","max_tokens":1,"stream":false}`,
		`{"cache_hit_threshold":0,"prompt":"x","max_tokens":1,"stream":false}`,
		`{"cache_hit_threshold":0,"prompt":"x","max_tokens":9,"min_tokens":2,"stream":true}`)
	f(`{"prompt":"x"}`, "", `{"prompt":"x","stream":false,"max_tokens":1}`, `{"prompt":"x"}`)
	f(`{"prompt":"x","cache_hit_threshold":null}`, "",
		`{"prompt":"x","cache_hit_threshold":null,"stream":false,"max_tokens":1}`, `{"prompt":"x","cache_hit_threshold":null}`)

	for answer, want := range map[string]bool{
		`{"choices":[{"finish_reason":"length"}]}`:          true,
		`{"choices":[{"finish_reason":"stop"}]}`:            true,
		`{"choices":[{"finish_reason":"cache_threshold"}]}`: false,
		`{"choices":[{"finish_reason":"error"}]}`:           false,
		`{"choices":[{"finish_reason":null}]}`:              false,
		`{}`:                                                false, `<html>`: false, ``: false,
	} {
		if got := (sharedStorage{}).Enough(nil, []byte(answer)); got != want {
			t.Errorf("enough by %s: %v", answer, got)
		}
	}
}

// TestOffloadingPull fetches a cached prefix from a third endpoint: into the prefill leg beside its own id, or into a
// request that decode serves alone.
func TestOffloadingPull(t *testing.T) {
	r := parse(t, inference.Completions, []byte(`{"prompt":"x"}`))
	x := between(r)
	x.Source = &pool.Endpoint{Addr: netip.MustParseAddrPort("[::ffff:10.0.0.3]:8001"), Rank: 1, Labels: map[string]string{P2PPortLabel: "7777"}}
	prefill, alone, none := stripped(r), stripped(r), stripped(r)
	offloading{}.Prefill(x, prefill)
	offloading{}.Pull(x, alone)
	const id = `00000000-0000-4000-8000-00000000000`
	source := func(n string) string {
		return `"remote_kv_source":{"kv_request_id":"` + id + n + `","remote_host":"10.0.0.3","remote_port":7778}`
	}
	want := `{"prompt":"x","stream":false,"max_tokens":1,"kv_transfer_params":{"remote_decoder":{"kv_request_id":"` + id + `1"},` + source("2") + `}}`
	if got := string(withoutIDs(x, written(t, prefill))); got != want {
		t.Errorf("prefill %s\nwant %s", got, want)
	}
	want = `{"prompt":"x","kv_transfer_params":{` + source("1") + `}}`
	if got := string(withoutIDs(x, written(t, alone))); got != want {
		t.Errorf("alone %s\nwant %s", got, want)
	}
	x.Source = nil
	if offloading.Pull(offloading{}, x, none); !none.Empty() {
		t.Errorf("pulls from nobody: %s", written(t, none))
	}
	// Without a prefill there is nobody to fetch from.
	if (offloading{}).Decode(between(r), nil, none); !none.Empty() {
		t.Errorf("decodes from nobody: %s", written(t, none))
	}
}

// TestLMCacheAnswer wants the first token as a sign, and nothing else.
func TestLMCacheAnswer(t *testing.T) {
	f := verdicts(t, lmcachePD{}, client(t, "completions"))
	f("good", answerOf(t, "lmcache-pd/chat.answer.json"), Ready)
	f("stopped by itself", `{"choices":[{"finish_reason":"stop"}],"kv_transfer_params":{"first_tok":2}}`, Ready)
	f("no parameters", `{"choices":[{"finish_reason":"length"}]}`, Missing)
	f("null parameters", `{"kv_transfer_params":null}`, Missing)
	f("no token", `{"kv_transfer_params":{"num_lmcache_cached_tokens":3}}`, Missing)
	f("null token", `{"kv_transfer_params":{"first_tok":null}}`, Missing)
	f("error", `{"choices":[{"finish_reason":"error"}],"kv_transfer_params":{"first_tok":2}}`, Failed)
	f("no JSON", `<html>`, Malformed)

	r := parse(t, inference.Completions, []byte(`{"prompt":"x"}`))
	x, body := between(r), stripped(r)
	x.Decode = nil
	lmcachePD{}.Prefill(x, body)
	if got := string(written(t, body)); strings.Contains(got, transferField) {
		t.Errorf("names a receiver although there is none: %s", got)
	}
	x = between(r)
	x.Decode.Labels = map[string]string{LMCacheInitPortLabel: "65534", LMCacheDataPortLabel: "0"}
	lmcachePD{}.Prefill(x, body)
	if got := string(written(t, body)); !strings.Contains(got, `"receiver_init_port":[65534,65535],"receiver_alloc_port":[7400,`) {
		t.Errorf("ports: %s", got)
	}
}

// TestMoRIIOAnswer knows that only an answer which was cut off has a handle.
func TestMoRIIOAnswer(t *testing.T) {
	good := answerOf(t, "moriio/completions.answer.json")
	f := verdicts(t, moriio{}, client(t, "completions"))
	f("good", good, Ready)
	for _, name := range []string{
		"do_remote_prefill", "remote_engine_id", "remote_host", "remote_block_ids", "transfer_id",
		"remote_handshake_port", "remote_notify_port",
	} {
		f("no "+name, strings.Replace(good, `"`+name+`"`, `"x"`, 1), Incomplete)
		f("null "+name, strings.Replace(good, `"`+name+`":`, `"`+name+`":null,"x":`, 1), Incomplete)
	}
	f("stopped by itself", `{"choices":[{"finish_reason":"stop"}],"kv_transfer_params":null}`, Complete)
	f("cut off without a handle", `{"choices":[{"finish_reason":"length"}]}`, Missing)
	f("handle of another connector", `{"kv_transfer_params":`+handle+`}`, Incomplete)
}

// TestTRTLLMAnswer takes what a generation server needs out of the only choice.
func TestTRTLLMAnswer(t *testing.T) {
	good := answerOf(t, "trtllm/completions.answer.json")
	f := verdicts(t, trtllm{}, client(t, "completions"))
	f("good", good, Ready)
	f("not finished", strings.Replace(good, `"length"`, `"not_finished"`, 1), Ready)
	f("stopped by itself", strings.Replace(good, `"length"`, `"stop"`, 1), Complete)
	f("called a tool", strings.Replace(good, `"length"`, `"tool_calls"`, 1), Complete)
	f("error", strings.Replace(good, `"length"`, `"error"`, 1), Failed)
	f("no parameters", `{"choices":[{"finish_reason":"length"}]}`, Missing)
	f("null parameters", strings.Replace(good, `"disaggregated_params":`, `"disaggregated_params":null,"x":`, 1), Missing)
	f("two choices", strings.Replace(good, `"choices":[`, `"choices":[{},`, 1), Missing)
	f("no choice", strings.Replace(good, `"choices":`, `"x":`, 1), Missing)
	for _, name := range []string{"ctx_request_id", "disagg_request_id", "first_gen_tokens"} {
		f("no "+name, strings.Replace(good, `"`+name+`"`, `"x"`, 1), Incomplete)
		f("null "+name, strings.Replace(good, `"`+name+`":`, `"`+name+`":null,"x":`, 1), Incomplete)
	}
	f("no request type", strings.Replace(good, `"request_type":"context_only"`, `"x":1`, 1), Incomplete)
	f("no first token", strings.Replace(good, `[4340]`, `[ ]`, 1), Incomplete)
	f("nested tokens", strings.Replace(good, `[4340]`, `[[4340]]`, 1), Incomplete)
	verdicts(t, trtllm{}, client(t, "chat_n"))("several choices", good, Complete)
}

// TestTRTLLMHandle is true to releases that do not know ctx_usage, and to servers that keep the token ids.
func TestTRTLLMHandle(t *testing.T) {
	f := func(answer, want string) {
		t.Helper()
		r := parse(t, inference.Completions, []byte(`{"prompt":"x"}`))
		x, body := between(r), stripped(r)
		a := trtllm{}.Answer(x, []byte(answer))
		trtllm{}.Decode(x, a.Handle, body)
		if got := string(written(t, body)); got != want {
			t.Errorf("got  %s\nwant %s", got, want)
		}
	}
	const choice = `"choices":[{"disaggregated_params":{"ctx_request_id":9007199254740993,"disagg_request_id":4,` +
		`"request_type":"x","first_gen_tokens":[5],"request_type":"context_only"%}}]`
	const params = `"disaggregated_params":{"ctx_request_id":9007199254740993,"disagg_request_id":4,` +
		`"request_type":"x","first_gen_tokens":[5],"request_type":"generation_only"`
	f(`{`+strings.Replace(choice, "%", "", 1)+`,"usage":{"prompt_tokens":1},"prompt_token_ids":[7 , 8]}`, `{"prompt":[7 , 8],`+params+`}}`)
	f(`{`+strings.Replace(choice, "%", `,"ctx_usage":null`, 1)+`}`, `{"prompt":"x",`+params+`,"ctx_usage":null}}`)
	f(`{`+strings.Replace(choice, "%", `,"ctx_usage":null`, 1)+`,"usage":{"prompt_tokens":1},"prompt_token_ids":null}`,
		`{"prompt":"x",`+params+`,"ctx_usage":{"prompt_tokens":1}}}`)
	f(`{`+strings.Replace(choice, "%", ``, 1)+`,"prompt_token_ids":[]}`, `{"prompt":"x",`+params+`}}`)
}

// TestCachedTokens tells none from not said.
func TestCachedTokens(t *testing.T) {
	f := func(usage string, want int64) {
		t.Helper()
		a := sharedStorage{}.Answer(between(&inference.Request{}), []byte(`{"usage":`+usage+`}`))
		if a.CachedTokens != want {
			t.Errorf("%s: %d, want %d", usage, a.CachedTokens, want)
		}
	}
	f(`{"prompt_tokens":4}`, -1)
	f(`null`, -1)
	f(`{"prompt_tokens":4,"prompt_tokens_details":null}`, -1)
	f(`{"prompt_tokens":4,"prompt_tokens_details":{"cached_tokens":null}}`, -1)
	f(`{"prompt_tokens":4,"prompt_tokens_details":{"cached_tokens":0}}`, 0)
	f(`{"prompt_tokens_details":{"created":9,"cached_tokens" : 32 }}`, 32)
	f(`{"input_tokens_details":{"cached_tokens":7}}`, 7)
	f(`{"cache_read_input_tokens":0}`, 0)
	f(`{"cache_read_input_tokens":224}`, 224)
	f(`{"prompt_tokens_details":{"cached_tokens":-1}}`, -1)
	f(`{"prompt_tokens_details":{"cached_tokens":1.5}}`, -1)
	for file, want := range map[string]int64{
		"prefill_basic.response.http": 0, "prefill_cached.response.http": 192, "i_messages_prefill.response.http": 224,
	} {
		if a := (nixlv2{}).Answer(between(&inference.Request{}), capture(t, file)); a.CachedTokens != want {
			t.Errorf("%s: %d, want %d", file, a.CachedTokens, want)
		}
	}
	a := nixlv2{}.Answer(between(&inference.Request{}), []byte(`{"kv_transfer_params":`+handle[:len(handle)-1]+`,"remote_prefill_cached_tokens":16}}`))
	if a.Verdict != Ready || a.CachedTokens != 16 {
		t.Errorf("by the handle: %+v", a)
	}
}

// TestCachedTokensOfOlderEngines takes a usage without details for none cached, if the handle is of an engine that gives
// them only where something was (vLLM before remote_prefill_cached_tokens).
func TestCachedTokensOfOlderEngines(t *testing.T) {
	const params = `"do_remote_prefill":true,"remote_engine_id":"e","remote_request_id":"r","remote_host":"10.0.0.7","remote_port":5600`
	f := func(usage, more string, want int64) {
		t.Helper()
		a := nixlv2{}.Answer(between(&inference.Request{}), []byte(" {"+usage+`"kv_transfer_params":{`+params+more+"}} "))
		if a.Verdict != Ready || a.CachedTokens != want {
			t.Errorf("%s %s: %+v, want %d cached", usage, more, a, want)
		}
	}
	const flat, grouped, push = `,"remote_block_ids":[3, 4]`, `,"remote_block_ids":[ [3,4]]`, `,"transfer_mode":"push"`
	f(`"usage":{"prompt_tokens":41},`, flat, 0)
	f(`"usage":{"prompt_tokens":41,"prompt_tokens_details":null},`, flat, 0)
	f(`"usage":{"input_tokens":41,"output_tokens":1},`, flat, 0)
	f(`"usage":{"prompt_tokens":41,"prompt_tokens_details":null},`, `,"remote_block_ids":[]`, 0)
	f(`"usage":{"prompt_tokens":41,"prompt_tokens_details":{"cached_tokens":32}},`, flat, 32)
	f(`"usage":{"prompt_tokens":41,"prompt_tokens_details":{"cached_tokens":null}},`, flat, -1)
	f(`"usage":{"input_tokens":41,"input_tokens_details":{}},`, flat, -1)
	f(`"usage":null,`, flat, -1)
	f(``, flat, -1)
	f(`"usage":{"prompt_tokens":41},`, grouped, -1)
	f(`"usage":{"prompt_tokens":41},`, push, -1)
	f(`"usage":{"prompt_tokens":41},`, flat+`,"remote_prefill_cached_tokens":null`, -1)
	f(`"usage":{"prompt_tokens":41},`, flat+`,"remote_prefill_cached_tokens":16`, 16)
}

// TestEngineGaveUp takes what an engine did not finish for no prefill, on every wire.
func TestEngineGaveUp(t *testing.T) {
	for name, e := range registry() {
		f := verdicts(t, e.connector, client(t, "chat"))
		for _, finish := range []string{"error", "abort", "timeout", "cancelled"} {
			f(name+" "+finish, `{"choices":[{"finish_reason":"`+finish+`"}],"kv_transfer_params":`+handle+`}`, Failed)
		}
		f(name+" cancelled response", `{"object":"response","status":"cancelled","kv_transfer_params":`+handle+`}`, Failed)
	}
}

// TestMooncakeAnswer knows that the blocks of an answer which ended by itself are not there (vLLM MooncakeConnector
// request_finished).
func TestMooncakeAnswer(t *testing.T) {
	f := verdicts(t, mooncake{}, client(t, "chat"))
	f("cut off", `{"choices":[{"finish_reason":"length"}]}`, Ready)
	f("cut off, Messages", `{"stop_reason":"max_tokens"}`, Ready)
	f("cut off, Responses", `{"object":"response","status":"incomplete"}`, Ready)
	f("stopped", `{"choices":[{"finish_reason":"stop"}]}`, Complete)
	f("stopped, Messages", `{"stop_reason":"end_turn"}`, Complete)
	f("stopped, Responses", `{"object":"response","status":"completed"}`, Complete)
}

// TestSharedStorageOfSGLang takes the list with which SGLang answers a list of one prompt.
func TestSharedStorageOfSGLang(t *testing.T) {
	r := parse(t, inference.SGLangGenerate, []byte(`{"text":["x"],"sampling_params":[{"max_new_tokens":4000,"n":2}]}`))
	x, body := between(r), stripped(r)
	sharedStorage{}.Prefill(x, body)
	if got, want := string(written(t, body)), `{"text":["x"],"sampling_params":{"max_new_tokens":1},"stream":false}`; got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	a := sharedStorage{}.Answer(x, []byte(`[{"text":"","meta_info":{"finish_reason":{"type":"length"},"prompt_tokens":41,"cached_tokens":32}}]`))
	if a.Verdict != Ready || a.PromptTokens != 41 || a.CachedTokens != 32 {
		t.Errorf("%+v", a)
	}
}
