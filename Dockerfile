# rcmae in a container; for CUDA: --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130. Not built yet.
FROM python:3.12-slim
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install --no-cache-dir torch torchvision --index-url "$TORCH_INDEX"
COPY . /rcmae
RUN pip install --no-cache-dir '/rcmae[tiff,heif]'
WORKDIR /work
ENTRYPOINT ["rcmae"]
