// SPDX-License-Identifier: Apache-2.0

package connectors

import (
	"testing"

	"github.com/baton-epp/baton/inference"
)

// TestOneToken caps every API's answer by the API's own name for the limit, and drops what would contradict it
// (llm-d's sidecar forgets Responses, generate and min_tokens).
func TestOneToken(t *testing.T) {
	f := func(api inference.API, client, want string) {
		t.Helper()
		r := parse(t, api, []byte(client))
		body := stripped(r)
		OneToken(r, body)
		if got := string(written(t, body)); got != want {
			t.Errorf("%s\ngot  %s\nwant %s", client, got, want)
		}
	}
	f(inference.Completions, `{"max_tokens":9,"min_tokens":2,"n":2,"stream":true,"stream_options":{},"return_token_ids":true}`,
		`{"max_tokens":1,"n":1,"stream":false}`)
	f(inference.Chat, `{"messages":[],"max_completion_tokens":9,"min_completion_tokens":2}`,
		`{"messages":[],"max_completion_tokens":1,"stream":false,"max_tokens":1}`)
	f(inference.Chat, `{"messages":[]}`, `{"messages":[],"stream":false,"max_tokens":1}`)
	f(inference.Responses, `{"input":"x","max_output_tokens":9,"min_tokens":2,"background":true}`,
		`{"input":"x","max_output_tokens":1,"stream":false}`)
	f(inference.Messages, `{"messages":[],"max_tokens":9,"stream":true}`, `{"messages":[],"max_tokens":1,"stream":false}`)
	f(inference.Generate, `{"sampling_params":{"min_tokens":2,"max_tokens":9,"n":2},"token_ids":[1]}`,
		`{"sampling_params":{"max_tokens":1,"n":1},"token_ids":[1],"stream":false}`)
	f(inference.Generate, `{"token_ids":[1]}`, `{"token_ids":[1],"stream":false,"sampling_params":{"max_tokens":1}}`)
	f(inference.SGLangGenerate, `{"text":"x","sampling_params":{"min_new_tokens":2,"max_new_tokens":9,"n":2,"max_tokens":5}}`,
		`{"text":"x","sampling_params":{"max_new_tokens":1,"n":1,"max_tokens":5},"stream":false}`)
	f(inference.SGLangGenerate, `{"text":"x"}`, `{"text":"x","stream":false,"sampling_params":{"max_new_tokens":1}}`)
	f(inference.SGLangGenerate, `{"text":["x","y"],"sampling_params":[{"max_new_tokens":9},{}],"stream":true}`,
		`{"text":["x","y"],"sampling_params":{"max_new_tokens":1},"stream":false}`)
}
