/* Greedy text of an artifact of `backend.type: native`, in token ids, through the C ABI of the library that lies in it.

   cc examples/native_generate.c ARTIFACT/libgemma_deploy.so -o native_generate
   ./native_generate ARTIFACT COUNT THREADS ID...

   Prints COUNT ids, or says what is wrong and exits with 1. What else there is to call is in
   gemma_deploy/backends/native/src/capi.cpp: a step may compute several sequences, which can be forked and set back. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

typedef struct GemmaModel GemmaModel;
typedef struct { /* some tokens that follow a sequence, and of how many of the last of them logits are wanted */
  int32_t sequence, count, wanted, unused;
  const int32_t* tokens;
} GemmaPiece;

int64_t gemma_plan(const char* graph, char* plan, size_t room, char* error, size_t error_size);
GemmaModel* gemma_open(const char* plan, size_t plan_size, const char* parameters, const char* level, int threads,
                       uint64_t cache_bytes, const char* cache_form, int exact, char* error, size_t error_size);
void gemma_close(GemmaModel* model);
const char* gemma_error(const GemmaModel* model);
uint64_t gemma_stride(const GemmaModel* model);
int gemma_vocabulary(const GemmaModel* model);
int gemma_sequence_new(GemmaModel* model, int like);
int gemma_step(GemmaModel* model, const GemmaPiece* pieces, int count, float* normed, float* logits, int rows);

static int Fail(const char* what) {
  fprintf(stderr, "%s\n", what);
  return 1;
}

int main(int count, char** given) {
  char graph[4096], parameters[4096], error[1000];
  if (count < 5) return Fail("native_generate ARTIFACT COUNT THREADS ID...");
  const int wanted = atoi(given[2]), threads = atoi(given[3]);
  snprintf(graph, sizeof graph, "%s/model.onnx", given[1]);
  snprintf(parameters, sizeof parameters, "%s/params.safetensors", given[1]);

  const int64_t size = gemma_plan(graph, NULL, 0, error, sizeof error);
  char* plan = size < 0 ? NULL : malloc((size_t)size);
  if (plan == NULL || gemma_plan(graph, plan, (size_t)size, error, sizeof error) != size) return Fail(error);
  const uint64_t caches = (uint64_t)1 << 30; /* bytes of all sequences together, at most */
  GemmaModel* model = gemma_open(plan, (size_t)size, parameters, "", threads, caches, "", 0, error, sizeof error);
  if (model == NULL) return Fail(error);

  int32_t* tokens = malloc((size_t)(count - 4) * sizeof *tokens); /* the prompt, and then one token after another */
  float* logits = malloc(gemma_stride(model) * sizeof *logits);
  if (tokens == NULL || logits == NULL) return Fail("no memory");
  for (int i = 4; i < count; i++) tokens[i - 4] = atoi(given[i]);
  GemmaPiece piece = {gemma_sequence_new(model, 0), count - 4, 1, 0, tokens};
  for (int made = 0; made < wanted; made++) {
    const int status = gemma_step(model, &piece, 1, NULL, logits, 1);
    if (status != 0) return Fail(status == 2 ? "no room is left for keys and values" : gemma_error(model));
    tokens[0] = 0;
    for (int id = 1; id < gemma_vocabulary(model); id++)
      if (logits[id] > logits[tokens[0]]) tokens[0] = id;
    printf("%d ", (int)tokens[0]);
    fflush(stdout);
    piece.count = 1;
  }
  printf("\n");
  gemma_close(model);
  free(logits), free(tokens), free(plan);
  return 0;
}
