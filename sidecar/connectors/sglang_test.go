// SPDX-License-Identifier: Apache-2.0

package connectors

import (
	"strings"
	"testing"

	"github.com/baton-epp/baton/inference"
)

// TestSGLangListOfOne gives lists to a request that lists its prompts, even one: SGLang numbers a single request id of
// these, and an abort would find no request by the id that both legs were given.
func TestSGLangListOfOne(t *testing.T) {
	f := func(api inference.API, client string, list bool) {
		t.Helper()
		r := parse(t, api, []byte(client))
		x, prefill, decode := between(r), stripped(r), stripped(r)
		sglang{}.Prefill(x, prefill)
		sglang{}.Decode(x, nil, decode)
		rid, rooms, _ := strings.Cut(x.Ticket, " ")
		want := `"bootstrap_host":"10.0.0.9","bootstrap_port":8998,"bootstrap_room":` + rooms + `,"rid":"` + rid + `"`
		if list {
			want = `"bootstrap_host":["10.0.0.9"],"bootstrap_port":[8998],"bootstrap_room":` + rooms + `,"rid":["` + rid + `"]`
		}
		for _, leg := range []string{string(written(t, prefill)), string(written(t, decode))} {
			if !strings.Contains(leg, want) || list != strings.HasPrefix(rooms, "[") {
				t.Errorf("%s: %s, want %s", client, leg, want)
			}
		}
	}
	f(inference.Completions, `{"prompt": [ "x"]}`, true)
	f(inference.Completions, `{"prompt":[[1,2]]}`, true)
	f(inference.Completions, `{"prompt":"x"}`, false)
	f(inference.Completions, `{"prompt":"[\"x\"]"}`, false)
	f(inference.Completions, `{"prompt":[ 1,2]}`, false)
	f(inference.Completions, `{"prompt":[ ]}`, false)
	f(inference.Completions, `{"prompt":"x","text":["x"]}`, false)
	f(inference.SGLangGenerate, `{"text":["x"]}`, true)
	f(inference.SGLangGenerate, `{"input_ids":[[1,2,3]]}`, true)
	f(inference.SGLangGenerate, `{"input_ids":[1,2,3]}`, false)
	f(inference.SGLangGenerate, `{"text":"x"}`, false)
	f(inference.Chat, `{"messages":[],"prompt":["x"]}`, false)
}

// TestSGLangRanks shows that no client keeps the legs apart: where the prefill endpoint has data-parallel ranks, both
// engines take the room's, unless they are told one (SGLang _resolve_prefill_dp_rank).
func TestSGLangRanks(t *testing.T) {
	const client = `{"text":"x","disagg_prefill_dp_rank":7,"routed_dp_rank":1,"data_parallel_rank":2}`
	r := parse(t, inference.SGLangGenerate, []byte(client))
	x, prefill, decode := between(r), stripped(r), stripped(r)
	sglang{}.Prefill(x, prefill)
	sglang{}.Decode(x, nil, decode)
	if leg := string(written(t, prefill)); strings.Contains(leg, "_rank") {
		t.Errorf("prefill %s", leg)
	}
	if leg := string(written(t, decode)); strings.Contains(leg, sglangPrefillRank) || !strings.Contains(leg, `"routed_dp_rank":1,"data_parallel_rank":2`) {
		t.Errorf("decode %s", leg)
	}
	sglang{}.Withdraw(x, decode)
	if got := string(written(t, decode)); got != client {
		t.Errorf("after Withdraw: %s", got)
	}
}

// TestOneChoiceWires lists the wires on which every choice would fetch for itself what can be fetched once.
func TestOneChoiceWires(t *testing.T) {
	want := map[string]bool{"sglang": true, "trtllm": true, "mooncake": true, "moriio": true, "offloading": true}
	for name := range registry() {
		if _, traits, _ := Lookup(name); traits.OneChoice != want[name] {
			t.Errorf("%s: OneChoice %v", name, traits.OneChoice)
		}
	}
	r := parse(t, inference.SGLangGenerate, []byte(`{"text":["x","y"],"sampling_params":[{"n":2},{"n":2}]}`))
	if r.N != 2 {
		t.Errorf("a list of sampling parameters asks for %d choices", r.N)
	}
}
