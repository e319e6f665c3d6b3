// SPDX-License-Identifier: Apache-2.0

package inference_test

import (
	"fmt"
	"io"
	"os"

	"github.com/baton-epp/baton/inference"
)

func ExampleParse() {
	var body inference.Body
	body.Append([]byte(`{"model":"tiny","messages":[{"role":"user","con`)) // as it came
	body.Append([]byte(`tent":"Say hello."}],"max_tokens":8}`))
	r, err := inference.Parse(inference.PathAPI("/v1/chat/completions"), body)
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println(r.Model, r.MaxTokens, r.Stream, r.Text, r.PromptTokens())
	// Output: tiny 8 false [{37 41} {54 64}] 4
}

func ExampleRequest_Edit() {
	var body inference.Body
	body.Append([]byte(`{"model":"tiny", "stream":true, "kv_transfer_params":{"do_remote_prefill":true}, "prompt":"hello"}`))
	r, err := inference.Parse(inference.Completions, body)
	if err != nil {
		fmt.Println(err)
		return
	}
	e := r.Edit()
	e.StripTransferFields()
	e.Set("stream", []byte("false"))
	e.Set("max_tokens", []byte("1"))
	if _, err := io.Copy(os.Stdout, e.Reader()); err != nil {
		fmt.Println(err)
	}
	// Output: {"model":"tiny", "stream":false, "prompt":"hello","max_tokens":1}
}

func ExampleField() {
	answer := []byte(`{"id":"cmpl-1","kv_transfer_params":{"remote_engine_id":"e", "remote_block_ids":[[1,2]]}}`)
	handle, ok, err := inference.Field(answer, "kv_transfer_params")
	fmt.Println(string(handle), ok, err)
	// Output: {"remote_engine_id":"e", "remote_block_ids":[[1,2]]} true <nil>
}

func ExampleUsageScanner() {
	var u inference.UsageScanner
	u.Feed([]byte("data: {\"choices\":[{\"finish_reason\":\"stop\"}]}\n\ndata: {\"choices\":[],\"usa"))
	u.Feed([]byte("ge\":{\"prompt_tokens\":33,\"completion_tokens\":5}}\n\ndata: [DONE]\n\n"))
	fmt.Printf("%+v\n", u.Usage())
	// Output: {Seen:true PromptTokens:33 CompletionTokens:5 CachedTokens:0 FinishReason:stop}
}
